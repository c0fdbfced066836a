"""Options that mean the same in every command.

`@options.seed` adds one; a command names the argument as the comment says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from mpq.data import Normalization
from mpq.data.stream import set_workers
from mpq.spec import WIDTHS
from mpq.targets import get_target
from mpq.trusted import is_name
from mpq.userimport import trust
from mpq.wide import INT16_FORMS

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


def _normalization(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> Normalization | None:
    return None if value is None else Normalization.parse(value)


Named = TypeVar("Named", str, tuple[str, ...], None)


def named(ctx: click.Context, param: click.Parameter, value: Named) -> Named:
    """A callback: code that is named on the command line is trusted for this command."""
    trust(*([value] if isinstance(value, str) else value or ()))
    return value


def _code(ctx: click.Context, param: click.Parameter, names: tuple[str, ...]) -> None:
    wrong = next((name for name in names if not is_name(name)), None)
    if wrong is not None:
        raise click.BadParameter(
            f"code must be named package.module:function. Got {wrong!r}.", ctx, param
        )
    trust(*names)


def name(flag: str, help: str, metavar: str = "NAME") -> Decorator[Any]:
    """An option that takes a name, which may be that of code, or None."""
    return click.option(flag, metavar=metavar, callback=named, help=help)


LIST = "BITS,..."
"""The metavar of a list of widths."""


def _widths(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[int, ...]:
    parts = [part.strip() for value in values for part in value.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) not in WIDTHS:
            known = ", ".join(map(str, WIDTHS))
            raise click.BadParameter(
                f"widths must be some of {known}, as in 8,4. Got {part!r}.", ctx, param
            )
    return tuple(dict.fromkeys(map(int, parts)))


def widths(flag: str, default: str, help: str) -> Decorator[Any]:
    """An option that takes bit widths: `8,4`, or repeated, or `8 4` in a `ListCommand`."""
    return click.option(
        flag,
        multiple=True,
        default=(default,),
        metavar=LIST,
        callback=_widths,
        help=f"{help}  [default: {default}]",
    )


class ListCommand(click.Command):
    """A command whose lists of widths may also be written with spaces: `--bits 16 8 4`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's, with numbers that follow a list joined to it."""
        lists = {opt for p in self.params if p.metavar == LIST for opt in p.opts}
        joined: list[str] = []
        for arg in args:
            if arg.isdecimal() and len(joined) > 1 and joined[-2] in lists:
                joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


def _positive(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"must be a number above 0. Got {value:g}.", ctx, param)
    return value


def limit(flag: str, help: str) -> Decorator[Any]:
    """An option that takes a finite number above 0, or None."""
    return click.option(flag, metavar="NUMBER", type=float, callback=_positive, help=help)


def _positives(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[float, ...]:
    found = []
    for part in (p.strip() for value in values for p in value.split(",")):
        try:
            number = float(part)
        except ValueError:
            raise click.BadParameter(
                f"must be numbers above 0, as in 4.2,4.8. Got {part!r}.", ctx, param
            ) from None
        found.append(_positive(ctx, param, number) or 0.0)
    return tuple(dict.fromkeys(found))


def limits(flag: str, help: str) -> Decorator[Any]:
    """An option that takes finite numbers above 0: `4.2,4.8`, or repeated; a tuple."""
    return click.option(flag, multiple=True, metavar="NUMBER,...", callback=_positives, help=help)


PATH = click.Path(path_type=Path)


def path(*flags: str, help: str, metavar: str = "FILE") -> Decorator[Any]:
    """An option that takes a path, or None."""
    return click.option(*flags, metavar=metavar, type=PATH, help=help)


def count(
    *flags: str, help: str, metavar: str = "COUNT", default: int | None = None, least: int = 1
) -> Decorator[Any]:
    """An option that takes a whole number from `least` on, or its default."""
    return click.option(*flags, metavar=metavar, type=click.IntRange(min=least), default=default,
                        show_default=True, help=help)  # fmt: skip


# num_calib: int | None
def num_calib(default: str) -> Decorator[Any]:
    """`--num-calib`: how many images are worked on, whatever for; the help says the default."""
    return count("--num-calib", help=f"Images to score and calibrate on.  [default: {default}]")


# num_test: int | None
def num_test(default: str, *, least: int = 1) -> Decorator[Any]:
    """`--num-test`: how many images are measured or compared on; the help says the default."""
    return count("--num-test", least=least, help=f"Images to measure on.  [default: {default}]")


def choice(
    flag: str, known: Iterable[str], *, help: str, default: str | None = None
) -> Decorator[Any]:
    """An option that takes one of the names known, or its default."""
    kind = click.Choice(tuple(known))
    return click.option(flag, type=kind, default=default, show_default=True, help=help)


def names(flag: str, help: str) -> Decorator[Any]:
    """An option that takes names with commas between: a tuple, empty by default."""

    def parse(context: object, parameter: object, text: str | None) -> tuple[str, ...]:
        return tuple(name.strip() for name in text.split(",")) if text else ()

    return click.option(flag, metavar="NAME,...", callback=parse, help=help)


def out(help: str = "Run folder to write to.  [default: runs/NAME]") -> Decorator[Any]:
    """`--out`, `-o`: argument `out`, a Path or None. The help says what is written there."""
    return path("--out", "-o", metavar="RUN", help=help)


def _target(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else get_target(value).name


def target(help: str) -> Decorator[Any]:
    """`--target`: argument `target`, one or several names with commas between, or None."""
    return click.option("--target", metavar="NAME,...", callback=_target,
                        help=f"{help} See mpq targets.  [default: this computer]")  # fmt: skip


# named: Path | None
policy = path("--policy", "named", help="POLICY, said as an option.")
# origin: str | None
origin = click.option(
    "--from",
    "origin",
    metavar="ptq|qat|FILE",
    help="The quantized network to take.  [default: the newest that is not stale]",
)
# seed: int
seed = count("--seed", metavar="N", default=0, least=0, help="Of all randomness.")
# data: str | None
data = name(
    "--data",
    "digits, cifar10, cifar100, a folder, zip, tar, shards, a .npz, module:factory, noise, "
    "or none.",
)


def _workers(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None:
        set_workers(value)


# no argument: it holds for the whole command
workers = click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=0),
    expose_value=False,
    callback=_workers,
    help="Processes that decode images, where these are streamed.  [default: one a processor]",
)
# data_root: Path | None
data_root = path(
    "--data-root",
    metavar="FOLDER",
    help="Where the data lie.  [default: $MPQ_DATA, then torchvision's places]",
)
# as_json: bool
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
# force: bool
force = click.option("--force", is_flag=True, help="Replace files that exist.")
# resume: bool
resume = click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
# threads: int | None
threads = count("--threads", metavar="N", help="Threads to compute with.  [default: 1]")
# effective_bits: tuple[float, ...]
effective_bits = limits(
    "--effective-bits",
    "Mean bits per weight; of several, each gets a policy file.  [default: 4.8, or "
    "near the narrowest of --bits, without other limits]",
)
# batch: int
batch = count("--batch", metavar="N", default=1, help="Images at a time.")


# int16_form: Int16Form | None
int16_form = choice(
    "--int16-form",
    INT16_FORMS,
    help="16-bit layers: fast leaves their inputs in float, exact rounds them to 16 bits, as the "
    "file then does.  [default: the policy's formats]",
)
# trust_pickle: bool
trust_pickle = click.option(
    "--trust-pickle", is_flag=True, help="Load a pickled module, which can run any code."
)
# model: str | None
model = name(
    "--model",
    "Architecture: a zoo or torchvision name, timm:NAME, torchvision:NAME, module:factory.",
)
# weights: str | None
weights = click.option(
    "--weights",
    metavar="PART",
    help="Which of several in a file: ema, raw, or the name of a part.  [default: ema if there]",
)
# no argument: what is trusted, is so for the whole command
trust_code = click.option(
    "--trust-code",
    metavar="MODULE:FUNCTION",
    multiple=True,
    expose_value=False,
    callback=_code,
    help="Let a file ask for this code of yours; its run remembers it.",
)
# normalize: Normalization | None
normalize = click.option(
    "--normalize",
    metavar="HOW",
    callback=_normalization,
    help="imagenet, cifar10, cifar100, none, raw, or m,m,m/s,s,s.  [default: what the model says]",
)
