"""Nestings of values, as arguments and answers are: walked and rebuilt from plain containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def leaves(value: Any) -> Iterator[Any]:
    """What a nesting of tuples, lists, dicts and slices holds."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def tensors(value: Any) -> list[Tensor]:
    """The tensors that a nesting holds."""
    return [v for v in leaves(value) if isinstance(v, Tensor)]


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nesting of plain tuples, lists, dicts and slices with every leaf changed.

    Named tuples become tuples, other mappings dicts in their order.
    """
    if isinstance(value, tuple):
        return tuple(rebuilt(v, change) for v in value)
    if isinstance(value, list):
        return [rebuilt(v, change) for v in value]
    if isinstance(value, dict):
        return {k: rebuilt(v, change) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(change(v) for v in (value.start, value.stop, value.step)))
    return change(value)


def plain_containers(value: Any) -> Any:
    """An answer whose containers are Python's own; what pytrees know is opened."""
    if isinstance(value, (tuple, list, dict, Tensor)):
        return rebuilt(value, lambda v: v if isinstance(v, Tensor) else _opened(v))
    return _opened(value)


def _opened(value: Any) -> Any:
    parts = pytree.tree_leaves(value)
    return value if len(parts) == 1 and parts[0] is value else tuple(parts)
