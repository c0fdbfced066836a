"""Numbers that remember which node of the graph gives them.

The size of a tensor that depends on the input is an `int` to whoever asks, and it knows its node:
arithmetic on it becomes nodes too, so that batch, height and width stay free in the graph. What
steers Python (a comparison, a loop) cannot stay free: comparisons are noted with their answer, and
so is every place where a size was read as a plain number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import fx


class Recording(Protocol):
    """What a number asks of whoever records."""

    def number(self, function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """The result of a calculation with sizes, with a node of its own."""

    def compared(self, function: Callable[..., Any], args: tuple[Any, ...], answer: bool) -> None:
        """Note a comparison."""

    def fixed(self, value: float) -> None:
        """Note that a size was read as a plain number."""


class Size(int):
    """An integer with its node."""

    node: fx.Node
    recording: Recording


class Ratio(float):
    """A real number with its node: a size times or over a number."""

    node: fx.Node
    recording: Recording


def sized(value: float, node: fx.Node, recording: Recording) -> Any:
    """A number that knows its node."""
    made: Any = (Size if isinstance(value, int) else Ratio)(value)
    made.node, made.recording = node, recording
    return made


def plain(value: Any) -> Any:
    """A number without its node; other values unchanged."""
    if isinstance(value, Size):
        return int.__add__(value, 0)
    return float.__add__(value, 0.0) if isinstance(value, Ratio) else value


def _calculation(function: Callable[..., Any], *, swapped: bool = False) -> Any:
    def apply(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        pair = (other, self) if swapped else (self, other)
        return self.recording.number(function, pair, function(*map(plain, pair)))

    return apply


def _comparison(function: Callable[..., Any]) -> Any:
    def apply(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        answer = function(plain(self), plain(other))
        self.recording.compared(function, (self, other), answer)
        return answer

    return apply


def _alone(function: Callable[..., Any]) -> Any:
    return lambda self: self.recording.number(function, (self,), function(plain(self)))


def _truth(self: Any) -> bool:
    answer = bool(plain(self))
    self.recording.compared(operator.ne, (self, 0), answer)
    return answer


def _read(as_type: Callable[[Any], Any]) -> Any:
    def apply(self: Any) -> Any:
        self.recording.fixed(plain(self))
        return as_type(plain(self))

    return apply


def _equip(kind: type) -> None:
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        function = getattr(operator, name)
        setattr(kind, f"__{name}__", _calculation(function))
        setattr(kind, f"__r{name}__", _calculation(function, swapped=True))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(kind, f"__{name}__", _comparison(getattr(operator, name)))
    special: dict[str, Any] = {
        "neg": _alone(operator.neg),
        "ceil": _alone(math.ceil),
        "floor": _alone(math.floor),
        "bool": _truth,
        "int": _read(int),
        "float": _read(float),
        "hash": lambda self: hash(plain(self)),
        "deepcopy": lambda self, memo: plain(self),
        "reduce": lambda self: (type(plain(self)), (plain(self),)),
    }
    for name, method in special.items():
        setattr(kind, f"__{name}__", method)


_equip(Size)
_equip(Ratio)
