"""What of a file may be the network, and which of it is taken.

Training scripts keep raw and averaged weights side by side, and a LightningModule has a criterion,
a metric or a teacher beside its network. Each of them is a `Part`, called by the keys and names
that lead to it: `state_dict_ema`, `state_dict.teacher`. Averaged weights are taken where there are
some: they are what timm and Ultralytics load and report, and `--weights raw` takes the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mpq.errors import CheckpointError, nearest
from mpq.zoo.spelling import few, is_average, short_names

DEPTH = 8
"""So many keys in a row are followed; some files contain themselves."""
INSIDE = 4
"""So many names in a row are followed inside of a state."""
NESTS = ("state_dict", "model_state_dict", "model", "net", "state", "network", "weights")
"""The keys under which most files keep the weights."""
_USUAL = {*NESTS, "", "module", "student", "params", "online_model"}
_AVERAGE = re.compile(r"(.*_)?(ema|swa|avg|averaged?)(_.*)?", re.IGNORECASE)
_OTHER = re.compile(
    r"optim|optimizer.*|.*sched.*|.*scaler|callbacks|loops|averaging_state|hyper_parameters|args|cfg"
)


@dataclass(frozen=True, eq=False)
class Part:
    """Tensors that may be a network.

    Args:
        name: the keys and names that lead to them, joined by dots; empty for a file as it is.
        state: the tensors, by their names below that.
        module: the module that they came in, if it did.
        averaged: whether they are means over the training.
        beside: what lies beside them and is none of them, in words.
    """

    name: str
    state: Mapping[str, Tensor]
    module: nn.Module | None = None
    averaged: bool = False
    beside: tuple[str, ...] = ()

    @cached_property
    def short(self) -> dict[str, str]:
        """Short to full names, of the tensors that count."""
        return short_names(self.state)

    @cached_property
    def plain(self) -> dict[str, Tensor]:
        """The tensors that count, by their short names."""
        return {short: self.state[name] for short, name in self.short.items()}


def states(content: Any) -> list[Part]:
    """The states in what was read from a file; its modules if it has some."""
    found = list(_walk(content, (), False, set()))
    return [part for part in found if part.module is not None] or found


def inside(part: Part, depth: int = INSIDE) -> Iterator[Part]:
    """What lies in a state under one name, outermost first."""
    groups: dict[str, dict[str, Tensor]] = {}
    for short, tensor in part.plain.items():
        first, dot, rest = short.partition(".")
        groups.setdefault(first, {})[rest if dot else first] = tensor
    for first, state in groups.items() if depth and len(groups) > 1 else ():
        name = f"{part.name}.{first}".removeprefix(".")
        others = [f"{k} ({len(v)})" for k, v in groups.items() if k != first]
        averaged = part.averaged or _is_average(first)
        child = Part(name, state, averaged=averaged, beside=(*part.beside, *others))
        yield child
        yield from inside(child, depth - 1)


def levels(parts: Sequence[Part], name: str | None) -> Iterator[list[Part]]:
    """The states of a file, then what lies inside of them: all, or those that `--weights` means.

    Args:
        parts: the states.
        name: `ema`, `raw`, the name of a part, or None.

    Raises:
        CheckpointError: there is no such part.
    """
    whole = [part for part in parts if _meant(part, name)]
    exact = [part for part in parts if part.name == name]
    yield exact or whole
    within = [deeper for part in parts if part.module is None for deeper in inside(part)]
    found = [part for part in within if _meant(part, name)]
    if not whole and not found:
        known = [p.name for p in (*parts, *within) if p.name and len(p.state) > 1]
        raise CheckpointError(
            f"--weights must be ema, raw, or the name of a part of the file. Got {name!r}, and it "
            f"has no such part: {few(known, 8) or 'it has no parts'}{nearest(str(name), known)}"
        )
    exact = [part for part in within if part.name == name]
    yield exact or found


def _meant(part: Part, name: str | None) -> bool:
    if name in ("ema", "raw"):
        return part.averaged is (name == "ema")
    return name is None or f".{part.name}".endswith(f".{name}")


def choose(fits: Sequence[Part]) -> Part:
    """The part to take, of those that a network fits.

    Raises:
        CheckpointError: several, of which none is the one to take by its name.
    """
    pool = [part for part in fits if part.averaged] or list(fits)
    usual = [part for part in pool if part.name.rpartition(".")[2] in _USUAL]
    pool = pool if len(pool) == 1 else usual
    if len(pool) != 1:
        listed = ", ".join(f"--weights {part.name}" for part in fits)
        raise CheckpointError(f"the weights of several networks fit. Choose with {listed}.")
    return pool[0]


def told(part: Part, fits: Sequence[Part]) -> str:
    """What was taken, what else there was and what was left out, in words; empty if nothing was."""
    others = [other for other in fits if other is not part]
    words = []
    if part.averaged or others or part.beside:
        kind = "averaged weights" if part.averaged else "weights"
        words.append(f"taken are the {kind}{f' under {part.name}' if part.name else ''}")
    if others:
        switch = "raw" if part.averaged and not others[0].averaged else others[0].name
        names = ", ".join(other.name or "the top" for other in others)
        words.append(f"those under {names} fit too: --weights {switch} takes them")
    if part.beside:
        words.append(f"left out are {few(list(part.beside), 6)}")
    types = {str(t.dtype) for t in part.state.values() if t.is_floating_point()}
    if types - {"torch.float32"}:
        words.append(f"what is {', '.join(sorted(types - {'torch.float32'}))} becomes float32")
    return "; ".join(words)


def _walk(content: Any, keys: tuple[str, ...], averaged: bool, seen: set[int]) -> Iterator[Part]:
    if isinstance(content, nn.Module):
        yield _unwrapped(content, ".".join(keys), averaged)
    if not isinstance(content, Mapping) or len(keys) > DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    own = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if own:
        yield Part(".".join(keys), own, averaged=averaged or is_average(own))
    # Lightning's WeightAveraging puts the means in the place of the weights, and those aside.
    swapped = "current_model_state" in content
    for key, value in content.items():
        if isinstance(key, str) and not _OTHER.fullmatch(key):
            mean = averaged or _is_average(key) or (swapped and key == "state_dict")
            yield from _walk(value, (*keys, key), mean, seen)


def _unwrapped(module: nn.Module, name: str, averaged: bool) -> Part:
    """A module as a part, without what only trains it."""
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
        averaged = averaged or isinstance(module, AveragedModel)
        module = module.module
    compiled = getattr(module, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return _unwrapped(compiled, name, averaged)
    return Part(name, module.state_dict(), module, averaged)


def _is_average(key: str) -> bool:
    return _AVERAGE.fullmatch(key) is not None
