"""From what the user names or gives to a metric or a loss.

A metric is a name of `NAMES`, an object (or what makes one: a class, a function of nothing) with
`update(outputs, targets)` and `compute()` as torchmetrics has them, or a function of outputs and
batch that gives a value for each image, `[N]`, or one for the batch. A loss is a function of
outputs and batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mpq.batch import described, moved, targets_of
from mpq.errors import MpqError, UsageError, nearest
from mpq.metrics.builtin import BUILTIN, NAMES
from mpq.metrics.metric import Metric, mean
from mpq.trusted import is_name
from mpq.userimport import import_callable

DRAWS = 50
"""Of an object, which is updated with all batches for each."""
LossFunction = Callable[[Any, Any], Tensor]
Decode = Callable[[Any], Any]


def metric_of(asked: Any, *, lower: bool = False) -> Metric:
    """The metric that is asked for; `agreement` is completed where the network is known.

    Args:
        asked: a name, `module:name`, an object or a function.
        lower: whether less is better, of what does not say so itself (`higher_is_better`).

    Raises:
        UsageError: no such name, or something else than a metric.
    """
    found = _metric(asked)
    if lower and isinstance(asked, str) and asked in NAMES:
        raise UsageError(f"higher is better of the metric {asked}. Leave out --lower-is-better.")
    return replace(found, higher=False) if lower else found


def decoded_by(decode: Decode | None, outputs: Any) -> Any:
    """What the user's function makes of outputs."""
    return outputs if decode is None else _run("--postprocess", decode, outputs)


def _metric(asked: Any) -> Metric:
    if not isinstance(asked, str):
        return _wrapped(asked, getattr(asked, "__name__", type(asked).__name__))
    if asked == "agreement":
        return Metric("agreement", lambda outputs, batch: [], mean, against="float")
    if asked in BUILTIN:
        return BUILTIN[asked]
    if not is_name(asked):
        raise UsageError(
            f"the metric must be one of {', '.join(NAMES)}, or module:function. Got {asked!r}"
            f"{nearest(asked, NAMES)}"
        )
    return _wrapped(import_callable(asked, "--metric", UsageError), asked)


def _wrapped(given: Any, name: str) -> Metric:
    if _accumulates(given) and not isinstance(given, type):
        return _accumulated(name, lambda: copy.deepcopy(given))
    if isinstance(given, type) or (callable(given) and _required(given) == 0):
        return _accumulated(name, given)
    if callable(given) and _required(given) in (2, None):
        return _function(name, given)
    raise UsageError(
        f"the metric {name} must be a function of outputs and batch, or an object with "
        f"update(outputs, targets) and compute(). Got {given!r}."
    )


def _accumulates(given: Any) -> bool:
    return callable(getattr(given, "update", None)) and callable(getattr(given, "compute", None))


def _required(function: Any) -> int | None:
    """How many arguments must be given; None where that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _accumulated(name: str, make: Callable[[], Any]) -> Metric:
    made = _run(name, make)
    if not _accumulates(made):
        raise UsageError(
            f"the metric {name} must give an object with update(outputs, targets) and compute(). "
            f"Got {type(made).__name__}."
        )

    def keep(outputs: Any, batch: Any) -> list[Any]:
        return [(moved(outputs, "cpu"), moved(targets_of(batch), "cpu"))]

    def total(parts: Sequence[Any]) -> float:
        metric = _run(name, make)
        for outputs, targets in parts:
            _run(name, metric.update, outputs, targets)
        return _number(name, _run(name, metric.compute))

    higher = getattr(made, "higher_is_better", None)
    return Metric(name, keep, total, higher is not False, draws=DRAWS)


def _function(name: str, function: Callable[[Any, Any], Any]) -> Metric:
    def keep(outputs: Any, batch: Any) -> list[Any]:
        found = _run(name, function, outputs, batch)
        if isinstance(found, Tensor) and found.ndim == 1:
            values: list[float] = found.double().tolist()
            return values
        return [(_number(name, found), 1)]

    def total(parts: Sequence[Any]) -> float:
        return mean([part if isinstance(part, float) else part[0] for part in parts])

    return Metric(name, keep, total, getattr(function, "higher_is_better", True) is not False)


def _number(name: str, found: Any) -> float:
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"the metric {name} must give one number (a function also one for each image). Got "
            f"{described(found)}."
        ) from None


def _run(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call the user's code; whatever it raises names it and what it was given."""
    try:
        return function(*args)
    except MpqError:
        raise
    except Exception as error:  # the user's code can fail in any way
        got = f" It was given {', '.join(map(described, args))}." if args else ""
        raise UsageError(f"{name} failed with {type(error).__name__}: {error}.{got}") from error


def own(outputs: Any, batch: Any) -> Tensor:
    """Stands for the network's own training step, which gives its loss of the batch alone."""
    raise UsageError("--loss own goes with mpq qat. Elsewhere a loss is of outputs and batch.")


def loss_of(asked: Any) -> LossFunction:
    """The user's loss, `module:function` or a function of outputs and batch; checked at each call.

    `own` is the network's own training step (`mpq.train.own`).

    Raises:
        UsageError: it cannot be imported, or fails; what it gives is no scalar, not finite, or no
            gradient reaches the outputs.
    """
    if asked == "own":
        return own
    named = asked if isinstance(asked, str) else getattr(asked, "__name__", type(asked).__name__)
    function = import_callable(asked, "--loss", UsageError) if isinstance(asked, str) else asked
    name = f"loss {named}"

    def loss(outputs: Any, batch: Any) -> Tensor:
        found = _run(name, function, outputs, batch)
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
            raise UsageError(f"{name} must give a scalar tensor. Got {described(found)}.")
        return found.reshape(())

    loss.__name__ = named
    loss.__wrapped__ = function  # type: ignore[attr-defined]
    return loss
