"""Options that come together and reach a command as one argument: `source`, `budgets`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click

from mpq.cli import options, places
from mpq.data import DataSource
from mpq.errors import UsageError
from mpq.pipeline.wishes import Wishes
from mpq.policy import Constraints, DropType

_BUDGETS = (
    options.effective_bits,
    options.limit("--max-size-mb", "Size of the file in MB (10^6 bytes)."),
    options.limit("--max-bops", "10^9 BitOps per image (MACs x weight bits x activation bits)."),
    options.limit("--max-activation-mb", "Peak of the activations alive at one time, in MB, each "
                  "tensor at its width."),
    options.limit("--max-latency-ms", "Milliseconds, as a profile of `mpq profile` predicts them."),
    click.option("--max-drop", metavar="NUMBER", type=click.FloatRange(min=0),
                 help="What may be lost of top-1, or of --metric, measured on validation images."),
    click.option("--drop-type", type=click.Choice(get_args(DropType)), default="absolute",
                 show_default=True, help="Of --max-drop: the metric's unit, or percent of float."),
)  # fmt: skip


def source_with(*more: options.Decorator[Any]) -> options.Decorator[Any]:
    """Where data come from, `--workers`, `--trust-code` and `more`: argument `source`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def folded(
            *,
            data: str | None,
            data_root: Path | None,
            holdout: int | None = None,
            unlabelled: str | None = None,
            **others: Any,
        ) -> Any:
            return command(source=DataSource(data, data_root, holdout, unlabelled), **others)

        shared = (options.data, options.data_root, options.workers, options.trust_code)
        return given(folded, *shared, *more)

    return decorate


source = source_with()


def policy(command: Callable[..., None]) -> Callable[..., None]:
    """`[POLICY]`, or `--policy` as before: argument `policy_path`, the file that is worked by."""

    @wraps(command)
    def folded(*, policy: Path | None, named: Path | None, **others: Any) -> None:
        if policy and named:
            raise UsageError(f"{policy} and --policy {named} name two policies. Give one of them.")
        command(policy_path=places.in_run(policy or named, "policy.yaml"), **others)

    argument = click.argument("policy", required=False, type=options.PATH)
    return given(folded, argument, options.policy)


def given(command: Callable[..., Any], *wanted: options.Decorator[Any]) -> Callable[..., Any]:
    """A command with options, in that order in its help."""
    for option in reversed(wanted):
        command = option(command)
    return command


def budgets(command: Callable[..., None]) -> Callable[..., None]:
    """Options of limits: argument `budgets`, a list of `Constraints`, one per policy wanted."""

    @wraps(command)
    def folded(*, effective_bits: tuple[float, ...], drop_type: DropType, **others: Any) -> None:
        limits = {name: others.pop(name) for name in Constraints.model_fields if name in others}
        limits["drop_type"] = None if limits["max_drop"] is None else drop_type
        found = [Constraints(effective_bits=bits, **limits) for bits in effective_bits or (None,)]
        command(budgets=found, **others)

    return given(folded, *_BUDGETS)


CODE = "MODULE:FUNCTION"
_WISHES = (
    options.name("--metric", "What answers are judged by: top1, top5, miou, map, psnr, ssim, "
                 "agreement (with the float network), or module:function."),
    click.option("--lower-is-better", is_flag=True,
                 help="Of a --metric that does not say so itself."),
    options.name("--postprocess", "Applied to the outputs before --metric sees them.", CODE),
    options.name("--batches", "Gives batches of inputs and targets, as a training loop has them: "
                 "a DataLoader, or a dict of these by train and validation.", CODE),
)  # fmt: skip


def wishes_with(metric: options.Decorator[Any]) -> options.Decorator[Any]:
    """`--metric` as given and what goes with it: argument `wishes`, a `Wishes`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def folded(
            *,
            metric: str | None,
            lower_is_better: bool,
            postprocess: str | None,
            batches: str | None,
            **others: Any,
        ) -> Any:
            return command(wishes=Wishes(metric, lower_is_better, postprocess, batches), **others)

        return given(folded, metric, *_WISHES[1:])

    return decorate


wishes = wishes_with(_WISHES[0])
