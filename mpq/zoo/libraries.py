"""Networks of other libraries, by name: `timm:NAME` and `torchvision:NAME`.

A library is imported when a network of it is asked for, and no weights are ever fetched.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

from torch import nn

from mpq import _torchvision
from mpq.data import Normalization
from mpq.data.images import CENTRE, FILTERS, Fit
from mpq.errors import UsageError, nearest

SIDE = 224
"""What most networks of libraries are made for."""
NAMES = ("timm", "torchvision")
# The auxiliary heads serve training from scratch only; a checkpoint's are dropped when it is read.
_OPTIONS: dict[str, dict[str, bool]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def library(name: str, purpose: str) -> ModuleType:
    """An optional library; what it takes of torchvision works beside a CPU-only torch.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    _torchvision.declare_missing()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs {name}, which cannot be imported here ({error}). Install it with "
            f"pip install {name}."
        ) from None


def build_timm(name: str, classes: int, channels: int = 3, **more: Any) -> nn.Module:
    """A network of timm, with random weights.

    Raises:
        UsageError: timm is not there, has no such network, or cannot build it so.
    """
    timm = _timm(name)
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=classes, in_chans=channels, **more
        )
    except Exception as error:
        raise UsageError(f"timm cannot build {name}: {type(error).__name__}: {error}") from error
    return network


def timm_config(name: str) -> Any:
    """What timm says of a network and its pretrained weights: `input_size`, `mean`, `classifier`.

    Raises:
        UsageError: timm is not there, or has no such network.
    """
    return _timm(name).get_pretrained_cfg(name)


def _timm(name: str) -> ModuleType:
    timm = library("timm", f"timm:{name}")
    if not timm.is_model(name):  # so that nothing is looked for elsewhere, as hf-hub:NAME would be
        known = timm.list_models()
        raise UsageError(f"timm has no network of the name {name!r}{nearest(name, known)}")
    return timm


def build_torchvision(name: str, classes: int) -> nn.Module:
    """A network of torchvision, with random weights.

    Raises:
        UsageError: torchvision has no such network, or cannot build it so.
    """
    options: dict[str, Any] = dict(_OPTIONS.get(name, {}))
    builder = _models(name).get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # they would be fetched
    try:
        network: nn.Module = builder(weights=None, num_classes=classes, **options)
    except Exception as error:
        raise UsageError(f"torchvision cannot build {name}: {error}") from error
    return network


def torchvision_side(name: str) -> int:
    """Side of the images that a network of torchvision is meant for.

    They state it with their weights, of which the smallest counts: larger ones belong to
    fine-tuned variants.
    """
    weights = _models(name).get_model_weights(name)
    stated = (getattr(w.transforms, "keywords", {}) for w in weights)
    sides = [k.get("crop_size", k.get("resize_size")) for k in stated]
    return min((side for side in sides if isinstance(side, int)), default=SIDE)


def torchvision_names() -> list[str]:
    """Torchvision's classifiers, sorted."""
    models = _torchvision.models()
    return sorted(models.list_models(module=models))


def _models(name: str) -> ModuleType:
    models = _torchvision.models()
    known = models.list_models()
    if name not in known:
        raise UsageError(f"torchvision has no network of the name {name!r}{nearest(name, known)}")
    return models


def declared_input(module: nn.Module) -> tuple[int, int, int] | None:
    """`(C, H, W)` as a network says it of itself; None where it does not.

    As an attribute `input_size`, or as timm, transformers and Ultralytics configure theirs.
    """
    config, timm = getattr(module, "config", None), declared_config(module)
    args, yaml = _mapping(module, "args"), _mapping(module, "yaml")
    for size, channels in (
        (getattr(module, "input_size", None), None),
        (timm.get("input_size"), None),
        (getattr(config, "image_size", None), getattr(config, "num_channels", 3)),
        (args.get("imgsz"), yaml.get("channels", yaml.get("ch", 3))),
    ):
        sides = [size] * 2 if isinstance(size, int) else size
        if isinstance(sides, (list, tuple)) and all(isinstance(s, int) and s > 0 for s in sides):
            shape = tuple(sides) if channels is None else (channels, *sides)
            if len(shape) == 3:
                return shape
    return None


def declared_pictures(module: nn.Module) -> tuple[str, str | None]:
    """How a network of timm wants its images normalized, and pictures fitted (`Fit`).

    Empty and None where it says nothing, or nothing that mpq does as well.
    """
    told = declared_config(module)
    mean, std, size = (tuple(told.get(k) or ()) for k in ("mean", "std", "input_size"))
    known = mean and len(mean) == len(std) == (size or (3,))[0]
    normalize = str(Normalization(mean, std)) if known else ""
    kind, share, mode = (told.get(k) for k in ("interpolation", "crop_pct", "crop_mode"))
    if kind not in FILTERS or mode not in (None, "center", "squash"):
        return normalize, None
    return normalize, str(Fit(kind, float(share or CENTRE), mode == "squash"))


def declared_config(module: nn.Module) -> dict[str, Any]:
    """What a network of timm says of itself; empty for others."""
    return _mapping(module, "pretrained_cfg") or _mapping(module, "default_cfg")


def _mapping(module: nn.Module, name: str) -> dict[str, Any]:
    found = getattr(module, name, None)
    return found if isinstance(found, dict) else {}
