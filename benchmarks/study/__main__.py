"""`python -m benchmarks.study PLAN [--only ...] [--time-limit MINUTES] [--device cuda]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from benchmarks.study.check import check
from benchmarks.study.clock import Clock, TimeUpError
from benchmarks.study.plan import PLANS, Plan
from benchmarks.study.shelf import Shelf
from benchmarks.study.work import Study
from mpq import trusting
from mpq.allocator import keep_freed
from mpq.errors import MpqError, UsageError

RESULTS = Path(__file__).parents[1] / "results"
TIME_UP = 3
"""Exit code where the limit was reached and more is to be done."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("what", nargs=-1, required=True, metavar="PLAN | check RESULTS")
@click.option("--only", multiple=True, metavar="STAGE", help="Stages, globs or kinds of them.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="MINUTES", help="Stop by then.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--runs", type=click.Path(path_type=Path), help="Stages.  [runs/study/PLAN]")
@click.option("-o", "--results", "out", type=click.Path(path_type=Path),
              help="What is kept.  [benchmarks/results/PLAN]")  # fmt: skip
@click.option("--any-code", is_flag=True, help="Take over stages of another code version.")
@click.option("--from-kept", is_flag=True,
              help="Take students of kept rows, where their stages are gone.")  # fmt: skip
@click.option("--rehearse", type=click.IntRange(min=8), metavar="IMAGES",
              help="Every stage on so few images, one epoch each.")  # fmt: skip
def main(
    what: tuple[str, ...],
    only: tuple[str, ...],
    time_limit: float | None,
    device: str,
    runs: Path | None,
    out: Path | None,
    any_code: bool,
    from_kept: bool,
    rehearse: int | None,
) -> None:
    """Make what is missing of a PLAN, or `check RESULTS`: measure what was kept again.

    Exit code 0: all is made, or as it was written. 1: `check` found a difference. 2: a plan, file
    or option is wrong. 3: the time limit was reached, 130: Ctrl-C; the same command goes on.
    """
    keep_freed()  # as mpq's commands do
    try:
        if what[0] == "check":
            sys.exit(_check(what[1:], only))
        plan = Plan.load(_one(what, "a PLAN, or check RESULTS"))
        plan = plan.rehearsal(rehearse) if rehearse else plan
        clock = Clock(time_limit)
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device must be cpu here: this torch sees no CUDA device. Got cuda.")
        shelf = Shelf(runs or Path("runs/study") / plan.name, plan.name, any_code=any_code)
        kept = out or (shelf.root / "results" if rehearse else RESULTS / plan.name)
        with trusting(*plan.code()):  # a plan is the user's own word, as a command line is
            Study(plan, shelf, kept, device, clock, click.echo, from_kept).run(only)
    except TimeUpError:
        click.echo("the time is up: what is finished is kept, and the same command goes on")
        sys.exit(TIME_UP)
    except KeyboardInterrupt:
        click.echo("stopped: what is finished is kept, and the same command goes on", err=True)
        sys.exit(130)
    except MpqError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"Error: {error}. What was finished is kept; mend it and run again.", err=True)
        sys.exit(2)
    click.echo(f"all is made: {kept}")


def _one(given: Sequence[str], what: str) -> str:
    if len(given) != 1:
        raise UsageError(f"the study must be told {what}. Got {' '.join(given) or 'nothing'}.")
    return given[0]


def _check(given: Sequence[str], only: tuple[str, ...]) -> int:
    results = Path(_one(given, "which results: check benchmarks/results/PLAN"))
    told = results / "plan.yaml"
    plan = Plan.load(told if told.is_file() else results.name)
    # Results may be anybody's: they run no code but what the plan of that name here asks for.
    ours = [p.stem for p in PLANS.glob("*.yaml")]
    with trusting(*(Plan.load(plan.name).code() if plan.name in ours else ())):
        wrong = check(results, plan, only=only, tell=click.echo)
    for text in wrong:
        click.echo(f"differs: {text}", err=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
