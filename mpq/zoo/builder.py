"""Build a network from its name.

    resnet20                  of this zoo
    resnet18                  a classifier of torchvision
    torchvision:NAME          any network of torchvision
    timm:NAME                 any network of timm
    package.module:factory    what a callable of the user's own returns

A factory is called with `classes=` (or `num_classes=`) and `in_channels=` as far as its signature
names them, and its module is looked for in the working directory first. An attribute
`input_size = (C, H, W)` on it, if there is one, says what images it wants; else the network is
asked, and (3, 32, 32) is assumed where it does not say either. Other sizes, such as `(C, L)`, are
those of its first argument, and `input_size = {"image": (3, 64, 64), "ids": "77:int64"}` says all.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from mpq.errors import UsageError, nearest
from mpq.inputs import InputSpec
from mpq.userimport import import_callable, raised, working_directory
from mpq.zoo import libraries
from mpq.zoo.architectures import ARCHITECTURES, INPUT_SIZE

logger = logging.getLogger(__name__)
FROM_FILES = ("pt2", "transformers")
"""Networks that only their own files can build."""


def names() -> list[str]:
    """All architectures by plain name: this zoo's, then torchvision's classifiers."""
    return [*ARCHITECTURES, *libraries.torchvision_names()]


def build(arch: str, classes: int, *, in_channels: int = 3) -> nn.Module:
    """Build a network with random weights, in evaluation mode.

    Args:
        arch: a name, as above.
        classes: number of outputs, at least 1.
        in_channels: channels of the image; always 3 for torchvision.

    Raises:
        UsageError: an unknown name, a library that is not installed, a factory that cannot be
            imported or fails, classes < 1.
    """
    if classes < 1:
        raise UsageError(f"classes of {arch} must be at least 1. Got {classes} instead.")
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch](classes=classes, in_channels=in_channels).eval()
    library, name = _split(arch)
    if library == "timm":
        return libraries.build_timm(name, classes, in_channels).eval()
    if library != "torchvision":
        return _from_factory(arch, classes, in_channels).eval()
    if in_channels != 3:
        raise UsageError(
            f"{arch} of torchvision takes 3 image channels. Got {in_channels} instead."
        )
    return libraries.build_torchvision(name, classes).eval()


def input_size(arch: str) -> tuple[int, int, int]:
    """Image shape `(C, H, W)` that an architecture is meant for; `stated_size` or (3, 32, 32)."""
    return stated_size(arch) or (3, *INPUT_SIZE)


def assumed(kind: str, channels: int, size: tuple[int, ...] | None) -> tuple[int, int, int]:
    """The image shape of a network that states none; with a word where `size` does not say it."""
    if size is None:
        logger.warning(
            "%s does not say the size of its images: %d,32,32 is taken. Say it with --input-shape, "
            "or as input_size = (C, H, W) of the class or factory",
            kind,
            channels,
        )
    return channels, *INPUT_SIZE


def stated_size(arch: str) -> tuple[int, int, int] | None:
    """Image shape `(C, H, W)` that an architecture states; None for a factory that does not.

    Raises:
        UsageError: an unknown name, a library that is not installed, a factory that cannot be
            imported.
    """
    if arch in ARCHITECTURES:
        return (3, *INPUT_SIZE)
    library, name = _split(arch)
    if library == "timm":
        channels, height, width = libraries.timm_config(name).input_size
    elif library == "torchvision":
        side = libraries.torchvision_side(name)
        channels, height, width = 3, side, side
    else:
        size = _stated(arch)
        if not isinstance(size, Sequence) or len(size) != 3:
            return None
        channels, height, width = size
    return int(channels), int(height), int(width)


def stated_inputs(arch: str) -> dict[str, InputSpec] | None:
    """What a factory says that its network takes; None for images, and for other architectures.

    Raises:
        UsageError: it says so in another form.
    """
    size = None if ":" not in arch or _split(arch)[0] else _stated(arch)
    if size is None or (isinstance(size, Sequence) and len(size) == 3):
        return None
    named = size if isinstance(size, Mapping) else {"": size}
    return {str(name): InputSpec.parse(_sizes(spec)) for name, spec in named.items()}


def _stated(arch: str) -> Any:
    return getattr(import_callable(arch, "--model", UsageError), "input_size", None)


def _sizes(spec: Any) -> str:
    return spec if isinstance(spec, str) else ",".join(map(str, spec))


def shaped(size: tuple[int, ...] | None, otherwise: tuple[int, int, int]) -> tuple[int, int, int]:
    """`(C, H, W)` of `size`, which may be one, a height and width alone, or None."""
    channels, height, width = (*otherwise[: 3 - len(size)], *size) if size else otherwise
    return channels, height, width


def _split(arch: str) -> tuple[str, str]:
    """The library of a name, and the name there; a factory is of no library."""
    library, colon, name = arch.partition(":")
    if colon and library in libraries.NAMES:
        return library, name
    if colon and library in FROM_FILES:
        raise UsageError(f"{arch} can be built from its own file only, which must be named.")
    if colon:
        return "", arch
    known = names()
    if arch not in known:
        raise UsageError(
            f"the architecture must be a network of the zoo, a classifier of torchvision, "
            f"timm:NAME, torchvision:NAME or package.module:factory. Got {arch!r} instead"
            f"{nearest(arch, known)}"
        )
    return "torchvision", arch


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
            f"({given}). It raised {raised(error)}"
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
