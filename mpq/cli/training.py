"""What `train` and `qat` share: teachers, the recipe's options and the live line of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from mpq.checkpoint import Reading
from mpq.cli import bundles, options, terminal
from mpq.data import Normalization
from mpq.errors import UsageError
from mpq.metrics.given import LossFunction, loss_of
from mpq.noise import margin
from mpq.processes import leading
from mpq.report.words import difference
from mpq.train.compiled import require_compiler
from mpq.train.ensemble import Ensemble, load_ensemble
from mpq.train.metrics import Record
from mpq.train.plan import Hooks
from mpq.train.recipe import Recipe


def _device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu here: this torch sees no CUDA device. Got cuda.")
    return value


# teacher: Path | None
teacher = options.path(
    "--teacher", help="An ensemble (ens.pth) or a single checkpoint to distil from."
)
# teacher_normalize: str
teacher_normalize = click.option(
    "--teacher-normalize",
    metavar="HOW",
    default="",
    help="As --normalize, for a single teacher whose file does not carry it.",
)
# teacher_model: str | None
teacher_model = options.name(
    "--teacher-model", "As --model, for a single teacher whose file does not say what it is."
)
# answers: Path | None
answers = click.option(
    "--keep-answers",
    "answers",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the teachers' answers there, for other runs on the same images.",
)
_holdout = options.count(
    "--holdout",
    metavar="N",
    least=0,
    help="Training images kept out, to choose by; 0 trains on all.  [default: 10 %]",
)
_unlabelled = options.name(
    "--unlabelled", "More images to distil from, named as --data is; their labels do not count."
)
source = bundles.source_with(_holdout, _unlabelled)
# transform: str | None
transform = options.name(
    "--transform",
    "Of each training picture by the workers: crop (torchvision's RandomResizedCrop), or "
    "module:factory of a torchvision v2 transform.",
)


def _loss(ctx: click.Context, param: click.Parameter, value: str | None) -> LossFunction | None:
    return None if value is None else loss_of(options.named(ctx, param, value))


# loss: LossFunction | None
loss = click.option(
    "--loss",
    metavar="MODULE:FUNCTION",
    callback=_loss,
    help="Of outputs and batch, a scalar that is a mean over the batch; own: in qat the network's "
    "training_step(batch), or what it gives for a batch in training mode.",
)
# epochs: int | None
epochs = options.count("--epochs", metavar="N", help="Epochs, instead of the recipe's.")
# settings: tuple[str, ...]
settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, e.g. lr=0.02; repeat for more.",
)
# compiling: bool
compiling = click.option(
    "--compile",
    "compiling",
    is_flag=True,
    help="Compile the training step first (minutes, then faster steps); needs a C++ compiler.",
)


def device_for(purpose: str) -> options.Decorator[Any]:
    """`--device`: argument `device`, a string."""
    return click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        callback=_device,
        help=purpose,
    )


device = device_for("Where to train.")


def recipe(default: str) -> options.Decorator[Any]:
    """`--recipe`: argument `recipe`, a string."""
    return click.option(
        "--recipe",
        metavar="NAME",
        default=default,
        show_default=True,
        help=f"{', '.join(Recipe.names())}, or a YAML file.",
    )


def recipe_from(
    name: str, epochs: int | None, settings: tuple[str, ...], *, compiling: bool = False
) -> Recipe:
    """A recipe by name or file, with overrides.

    Raises:
        UsageError: an unknown recipe or key, or a setting without `=`.
    """
    changes: dict[str, object] = {} if epochs is None else {"epochs": epochs}
    if compiling:
        changes["compile"] = True
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set must be KEY=VALUE, e.g. --set lr=0.02. Got {setting!r}.")
        changes[key.strip()] = _value(key.strip(), value)
    return Recipe.load(name).override(changes)


def check_plan(
    recipe: Recipe, *, device: str, teacher: Path | None, unlabelled: str | None
) -> None:
    """Refuse before any work what training would refuse.

    Raises:
        UsageError: no compiler for `device` where the recipe wants one, or images without labels
            where no teacher answers them.
    """
    if unlabelled is not None and teacher is None:
        raise UsageError(
            f"--unlabelled {unlabelled} needs a --teacher: nothing else says what these images "
            "are. The network before it is quantized can be its own: --teacher model.pth."
        )
    if recipe.compile:
        require_compiler(device)


def gain(
    before: float | None, after: float | None, count: int, recipe: Recipe, *, start: str
) -> None:
    """Say what training changed, and what to try where it did harm; top-1 in percent.

    `start` names what training began with, `count` is how many images the figures are of.
    """
    if before is None or after is None or not count:
        return
    terminal.say(f"before training it was {before:.2f} %: {difference(after, before, count)}")
    if before - after > margin(before, after, count):
        terminal.say(
            "so training cost accuracy: its rate is too high for this network, or it was too "
            f"short. Try --set lr={recipe.lr / 10:g}, or keep {start}"
        )


def _value(key: str, text: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {key} must be a plain value. Got {text!r}.") from None


def load_teacher(path: Path | None, normalize: str, model: str | None) -> Ensemble | None:
    """The teachers, if any, with what is known of them said aloud."""
    if path is None:
        return None
    known = str(Normalization.parse(normalize)) if normalize else ""
    with terminal.rephrased("--model ", "--teacher-model "):
        found = load_ensemble(path, normalize=known, how=Reading(model))
    terminal.say(f"teacher {path}: {', '.join(found.names)}")
    return found


@contextmanager
def live(epochs: int) -> Iterator[Hooks]:
    """Hooks for the loop: a bar per epoch while it runs, a line per epoch when it is done.

    Of several processes the leading one speaks.
    """
    if not leading():
        yield Hooks()
        return
    with terminal.bars() as tell:

        def on_step(epoch: int, step: int, steps: int, loss: float) -> None:
            done, all_of_them = epoch * steps + step + 1, epochs * steps  # for the time left
            tell("training", done, all_of_them, f"epoch {epoch + 1}/{epochs}  loss {loss:.3f}")

        def on_epoch(record: Record) -> None:
            val = record.get("val_top1")
            train = record["train_top1"]
            shown = "" if train is None else f"  training {train:.2f} %"
            shown += "" if val is None else f"  validation {val:.2f} %"
            if "metric" in record:
                shown += f"  {record['metric']} {record['value']:.4g}"
            terminal.say(
                f"epoch {record['epoch'] + 1}/{epochs}  loss {record['train_loss']:.4f}"
                f"{shown}  {record['seconds']:.1f} s"
            )

        yield Hooks(on_step=on_step, on_epoch=on_epoch)
