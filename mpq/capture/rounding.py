"""Tell a difference from rounding: the same two in float64, where rounding is 2^29 times smaller.

A network may amplify the rounding of float32 until its answers are percents apart (one that is not
trained, with many layers); a graph that is made otherwise is as far from it in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

ROUNDED = 1e-5
"""How far a weight may be off that was computed in float32, to the largest: sums of thousands."""


@contextmanager
def in_float64() -> Iterator[None]:
    """What asks for float32, by name or by default, gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widening(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        function = Tensor.double if function is Tensor.float else function
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*map(_wider, args), **named)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def wide(tensor: Tensor) -> Tensor:
    """A tensor of float32 in float64; any other as it is."""
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def widened(module: nn.Module) -> nn.Module:
    """A copy whose tensors of float32 are of float64, also those that are no buffers."""
    made = copy.deepcopy(module).double()
    for part in made.modules():
        own = {name: v for name, v in vars(part).items() if isinstance(v, Tensor)}
        vars(part).update({name: wide(v) for name, v in own.items()})
    return made


def alike(one: fx.GraphModule, other: fx.GraphModule) -> bool:
    """Whether two graphs do the same with the same tensors, but for the rounding of these."""
    steps = [[(n.op, n.target) for n in graph.graph.nodes] for graph in (one, other)]
    first, second = one.state_dict(), other.state_dict()
    if steps[0] != steps[1] or first.keys() != second.keys():
        return False
    return all(_close(first[name], second[name]) for name in first)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not other.is_floating_point():
        return torch.equal(one, other)
    bound = ROUNDED * other.abs().amax() if other.numel() else 0
    return bool(((one - other).abs() <= bound).all())
