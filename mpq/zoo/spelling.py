"""Names of a checkpoint's tensors: what stands before them, other spellings, and how sets differ.

DataParallel and DDP write `module.` before all names, training frameworks `model.` or `net.`;
torch.compile, FSDP and activation checkpointing write a part of their own wherever they wrap. A
network on its own has several parts at the top, so a part that all names share is none of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor

Shape = tuple[int, ...]
Value = TypeVar("Value")

_COUNTER = re.compile(r"(.*\.)?(num_batches_tracked|total_ops|total_params|n_averaged)")
_AUXILIARY = re.compile(r"(aux1|aux2|AuxLogits)\..*")
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Other public names for the same tensors, each set tried as a whole.
_SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")),
    ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")),
    ((r"(denselayer\d+)\.(norm|conv)\.([12])\.", r"\1.\2\3."),),
)


def strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that count, under their short names."""
    return {short: state[name] for short, name in short_names(state).items()}


def short_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Short to full names, of the tensors that count.

    Short is without wrappers and what all names share. Counters do not count, nor do the auxiliary
    classifiers that only training uses.
    """
    short = {_WRAPPER.sub("", name): name for name in state if counts(name)}
    while len({s.partition(".")[0] for s in short}) == 1 and all("." in s for s in short):
        short = {s.partition(".")[2]: name for s, name in short.items()}
    return {s: name for s, name in short.items() if counts(s)}


def counts(name: str) -> bool:
    """Whether a tensor of that name is learnt and serves the answer."""
    return not (_COUNTER.fullmatch(name) or _AUXILIARY.fullmatch(name))


def is_average(state: Mapping[str, Tensor]) -> bool:
    """Whether it is that of torch's `AveragedModel`, which counts what it has averaged."""
    return "n_averaged" in state


def spellings(state: Mapping[str, Value]) -> Iterator[Mapping[str, Value]]:
    """What tensors have, by their names, then by each other set of names that differs."""
    yield state
    for rules in _SPELLINGS:
        names = {name: name for name in state}
        for pattern, new in rules:
            names = {old: re.sub(pattern, new, name) for old, name in names.items()}
        renamed = {names[old]: value for old, value in state.items()}
        if renamed.keys() != state.keys():
            yield renamed


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def differences(have: Mapping[str, Shape], want: Mapping[str, Shape], *, limit: int = 3) -> str:
    """What a checkpoint lacks, has too much or in another shape, in words."""
    parts = []
    for word, keys in (
        ("missing", [k for k in want if k not in have]),
        ("not expected", [k for k in have if k not in want]),
    ):
        if keys:
            parts.append(f"{len(keys)} {word} ({few(keys, limit)})")
    other = [k for k in want if k in have and have[k] != want[k]]
    if other:
        listed = [f"{k} is {list(have[k])}, must be {list(want[k])}" for k in other]
        parts.append(f"{len(other)} of another shape ({few(listed, limit)})")
    return "; ".join(parts) or "nothing"


def few(items: list[str], limit: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
