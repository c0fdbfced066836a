"""How a network is called: inputs and answers are trees of tensors.

Inputs are one tensor, a tuple of positional arguments or a dict of keyword arguments, nested as the
network takes them. An answer is what a network gives: a tensor, or tuples, lists and dicts of them.

    for part in split(inputs, 128):          # batches of the same kind
        answer = call(module, part)          # of an nn.Module, or of a graph
        for name, tensor in leaves(answer).items(): ...

The names of `leaves` are those of a file's outputs: `output` for a tensor, `output.0` in a tuple,
the keys of a dict, and dotted paths below (`boxes.0`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpq.errors import UsageError

Inputs: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"


def count(inputs: Inputs) -> int:
    """How many images (or other samples) inputs hold: the first size of their tensors.

    A tensor without dimensions belongs to every sample.

    Raises:
        UsageError: they hold no tensor, or the first sizes differ.
    """
    sizes = {name: len(t) for name, t in leaves(inputs, "input").items() if t.ndim}
    if not isinstance(inputs, (Tensor, tuple, dict)) or not sizes:
        raise UsageError(
            "inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments, with a tensor of samples. Got {type(inputs).__name__}."
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(
            f"the tensors of a batch must have the same first size. Got {listed}. Repeat what "
            "belongs to every sample along a first dimension."
        )
    return next(iter(sizes.values()))


def take(inputs: Inputs, rows: slice | Tensor) -> Any:
    """Some of the samples, as a tree of the same kind."""
    return pytree.tree_map_only(Tensor, lambda t: t[rows] if t.ndim else t, inputs)


def to_device(inputs: Inputs, device: str | torch.device) -> Any:
    """The same inputs on a device."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), inputs)


def split(inputs: Inputs, batch: int) -> list[Any]:
    """Inputs in batches of at most `batch` samples, each of the same kind; without a copy.

    Raises:
        UsageError: as `count`.
    """
    total = count(inputs)
    if isinstance(inputs, Tensor):
        return list(torch.split(inputs, batch))
    return [take(inputs, slice(at, at + batch)) for at in range(0, total, batch)]


def call(module: nn.Module, inputs: Inputs) -> Any:
    """What a module answers, be it a network or a graph made from one.

    Raises:
        UsageError: a graph takes other inputs.
    """
    if isinstance(module, fx.GraphModule):
        return module(*arguments(module, inputs))
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def arguments(module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """Inputs in the order of a graph's placeholders, as `fx.Interpreter.run` takes them.

    What holds no tensor is no input of a graph: it was taken over from the example call.

    Raises:
        UsageError: too few or too many, or other names.
    """
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    pairs = inputs.items() if isinstance(inputs, dict) else enumerate(_sequence(inputs))
    given = {key: value for key, value in pairs if next(_walk("", value), None)}
    fits = set(given) == set(names) if isinstance(inputs, dict) else len(given) == len(names)
    if not fits:
        got = list(given) if isinstance(inputs, dict) else f"{len(given)} by position"
        raise UsageError(f"the network takes the inputs {', '.join(names)}. Got {got}.")
    return [given[name] for name in names] if isinstance(inputs, dict) else list(given.values())


def flat(module: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """The tensors of inputs in the order in which a file made from a graph takes them.

    Raises:
        UsageError: as `arguments`.
    """
    return [t for value in arguments(module, inputs) for t in leaves(value).values()]


def leaves(answer: Any, root: str = "output", kind: type = Tensor) -> dict[str, Any]:
    """The tensors of an answer (or of inputs) by name, in order; numbers and None are left out.

    Args:
        answer: any tree.
        root: the name of a lone tensor, and what the names within a tuple begin with.
        kind: of the leaves; nodes, for the answer of a graph as it is written.
    """
    return dict(_walk("" if isinstance(answer, dict) else root, answer, kind))


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs whose tensors have these names: what `leaves` takes apart.

    Names are those of arguments, or paths below them; parts that are numbered become a tuple.
    """
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return {name: _numbered(value) for name, value in tree.items()}


def refill(tree: Any, tensors: Iterable[Any]) -> Any:
    """A tree of the same kind with other tensors, in the order of `leaves`."""
    rest = iter(tensors)
    return pytree.tree_map_only(Tensor, lambda _: next(rest), tree)


def _numbered(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    parts = {name: _numbered(part) for name, part in value.items()}
    if list(parts) == [str(i) for i in range(len(parts))]:
        return tuple(parts.values())
    return parts


def described(inputs: Any) -> str:
    """The shapes of inputs in words, without the batch."""
    shapes = [str(list(t.shape[1:])) for t in leaves(inputs).values()]
    return f"{'an input of shape' if len(shapes) == 1 else 'inputs of shapes'} {', '.join(shapes)}"


def _sequence(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _walk(path: str, value: Any, kind: type = Tensor) -> Iterator[tuple[str, Any]]:
    if isinstance(value, kind):
        yield path, value
    elif isinstance(value, (dict, tuple, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(f"{path}.{key}" if path else str(key), part, kind)
    elif not pytree.tree_is_leaf(value):
        yield from _walk(path, tuple(pytree.tree_leaves(value)), kind)


def formed(named: Mapping[str, Tensor]) -> Any:
    """An answer as a network gives it, of its leaves: a tensor, a tuple, or a dict by name.

    What was nested comes back as a dict with dotted names.
    """
    if list(named) == ["output"]:
        return named["output"]
    if named and list(named) == [f"output.{i}" for i in range(len(named))]:
        return tuple(named.values())
    return dict(named)
