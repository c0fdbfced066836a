"""Build a network from its name: of this zoo, of torchvision, or `package.module:factory`.

A factory is any callable that returns an `nn.Module`. It is called with `classes=` (or
`num_classes=`) and `in_channels=` as far as its signature names them, and its module is looked
for in the working directory first. An attribute `input_size = (C, H, W)` on it, if there is one,
says what images it wants; otherwise (3, 32, 32) is assumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from mpq import _torchvision
from mpq.errors import UsageError, nearest
from mpq.userimport import import_callable, working_directory
from mpq.zoo.architectures import ARCHITECTURES, INPUT_SIZE

# What a builder of torchvision takes apart from num_classes. The auxiliary heads serve training
# from scratch only; a checkpoint's are dropped when it is read.
_TORCHVISION_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def names() -> list[str]:
    """All architectures by name: this zoo's, then torchvision's classifiers."""
    return [*ARCHITECTURES, *torchvision_names()]


def torchvision_names() -> list[str]:
    """Torchvision's classifiers, sorted."""
    models = _torchvision.models()
    return sorted(models.list_models(module=models))


def build(arch: str, classes: int, *, in_channels: int = 3) -> nn.Module:
    """Build a network with random weights, in evaluation mode.

    Args:
        arch: a name of `names()`, or `package.module:factory`.
        classes: number of outputs, at least 1.
        in_channels: channels of the image; other than 3 only for this zoo and factories.

    Raises:
        UsageError: an unknown name, a factory that cannot be imported or fails, classes < 1.
    """
    if classes < 1:
        raise UsageError(f"classes of {arch} must be at least 1. Got {classes} instead.")
    if ":" in arch:
        return _from_factory(arch, classes, in_channels).eval()
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch](classes=classes, in_channels=in_channels).eval()
    _check_known(arch)
    if in_channels != 3:
        raise UsageError(
            f"{arch} of torchvision takes 3 image channels. Got {in_channels} instead."
        )
    options = _TORCHVISION_OPTIONS.get(arch, {})
    models = _torchvision.models()
    network: nn.Module = models.get_model(arch, weights=None, num_classes=classes, **options)
    return network.eval()


def input_size(arch: str) -> tuple[int, int, int]:
    """Image shape `(C, H, W)` that an architecture is meant for.

    torchvision's networks state it with their weights, of which the smallest counts: larger
    ones belong to fine-tuned variants. No weights are fetched.

    Raises:
        UsageError: an unknown name, a factory that cannot be imported.
    """
    if ":" in arch:
        factory = import_callable(arch, "--model", UsageError)
        channels, height, width = getattr(factory, "input_size", (3, *INPUT_SIZE))
        return int(channels), int(height), int(width)
    if arch in ARCHITECTURES:
        return (3, *INPUT_SIZE)
    _check_known(arch)
    weights = _torchvision.models().get_model_weights(arch)
    side = min((int(w.transforms.keywords["crop_size"]) for w in weights), default=224)
    return 3, side, side


def _check_known(arch: str) -> None:
    known = names()
    if arch not in known:
        raise UsageError(
            f"the architecture must be a network of the zoo, a classifier of torchvision or "
            f"package.module:factory. Got {arch!r} instead{nearest(arch, known)}"
        )


def _from_factory(arch: str, classes: int, in_channels: int) -> nn.Module:
    factory = import_callable(arch, "--model", UsageError)
    options = _wanted(factory, classes, in_channels)
    try:
        with working_directory():
            network = factory(**options)
    except (Exception, SystemExit) as error:  # user code may raise anything
        given = ", ".join(f"{k}={v}" for k, v in options.items())
        raise UsageError(
            f"the factory {arch} must build a network when called as {arch.split(':')[1]}"
            f"({given}). It raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"the factory {arch} must return a torch.nn.Module. Got {type(network).__name__} "
            f"instead."
        )
    return network


def _wanted(factory: Callable[..., Any], classes: int, in_channels: int) -> dict[str, int]:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a callable written in C
        return {}
    offered = {"in_channels": in_channels}
    offered["classes" if "classes" in parameters else "num_classes"] = classes
    return {name: value for name, value in offered.items() if name in parameters}
