"""The sizes of inputs that may be free: the batch, and what the first image or signal has.

A tensor `[N, C, L]` has a length, `[N, C, H, W]` height and width, `[N, C, D, H, W]` a depth before
them. Other inputs that end with the same sizes (a mask `[N, H, W]`) share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpq.errors import UsageError

SIZES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
"""Names of what follows batch and channels, by number of dimensions."""
AXES = ("batch", "length", "depth", "height", "width")
FACTORS = ((0.5, 1.0), (1.5, 1.25), (1.0, 0.5), (2.0, 1.0), (1.0, 3.0))
"""Other sizes to try: of the first free one, and of those after it."""
TRIED = 2
"""At how many other sizes something must hold to count as holding at any."""


def axes_of(tensors: Sequence[Tensor], free: Sequence[str] = AXES) -> list[dict[int, str]]:
    """The free dimensions of each tensor, with their names."""
    first = next((t for t in tensors if t.ndim in SIZES), None)
    names = SIZES[first.ndim] if first is not None else ()
    ends = tuple(first.shape[2:]) if first is not None else ()
    found = []
    for tensor in tensors:
        own = {0: "batch"} if tensor.ndim else {}
        start = tensor.ndim - len(names)
        if names and start > 0 and tuple(tensor.shape[start:]) == ends:
            own |= {start + i: name for i, name in enumerate(names)}
        found.append({dim: name for dim, name in own.items() if name in free})
    return found


def check_axes(tensors: Sequence[Tensor], free: Sequence[str]) -> None:
    """Refuse names of sizes that no input has.

    Raises:
        UsageError: there is one.
    """
    known = sorted({name for axes in axes_of(tensors) for name in axes.values()}, key=AXES.index)
    for name in free:
        if name not in known:
            shapes = ", ".join(str(list(t.shape)) for t in tensors)
            raise UsageError(
                f"dynamic sizes must be among {', '.join(known)} for inputs of shape {shapes}. "
                f"Got {name!r}."
            )


def resized(inputs: Any, free: Sequence[str]) -> Iterator[Any]:
    """The same inputs at other sizes, by repeating or leaving out rows and columns."""
    leaves, tree = pytree.tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    axes = axes_of([leaves[i] for i in places], [name for name in free if name != "batch"])
    order = sorted({name for own in axes for name in own.values()}, key=AXES.index)
    for factors in FACTORS if order else ():
        changed, other = list(leaves), dict(zip(order, (*factors, factors[-1]), strict=False))
        for i, own in zip(places, axes, strict=True):
            for dim, name in own.items():
                old = changed[i].shape[dim]
                new = max(1, round(old * other[name]))
                rows = torch.arange(new) * old // new
                changed[i] = changed[i].index_select(dim, rows.to(changed[i].device))
        if any(a.shape != b.shape for a, b in zip(changed, leaves, strict=True)
               if isinstance(a, Tensor)):  # fmt: skip
            yield pytree.tree_unflatten(changed, tree)
