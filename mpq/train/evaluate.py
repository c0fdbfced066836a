"""Logits and accuracy of a model on uint8 images, in batches, in eval mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.calls import leaves
from mpq.data import Normalization
from mpq.data.normalize import NAMED
from mpq.errors import DataError
from mpq.train.deliver import slices

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def as_tensor(values: NDArray[Any]) -> Tensor:
    """The array as a tensor that shares its memory, or a copy of an array that is read-only."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def send(values: NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor there; an accelerator does not wait for it, and is not waited for."""
    here = torch.from_numpy(values)
    if device.type != "cuda":
        return here.to(device)
    return here.pin_memory().to(device, non_blocking=True)


def to_unit(images: Tensor) -> Tensor:
    """Float32 `[B, C, H, W]` in 0..1 of uint8 `[B, H, W, C]`; floats `[B, H, W, C]` as they are."""
    planes = images.permute(0, 3, 1, 2).contiguous()
    return planes if planes.is_floating_point() else planes.float().div_(255)


def normalize_unit(images: Tensor, normalize: Normalization) -> Tensor:
    """`(x - mean) / std` per channel of images `[B, C, H, W]` in 0..1.

    `none` leaves images of any number of channels as they are.
    """
    if normalize == NAMED["none"]:
        return images.clone()  # a network may write into what it is given
    mean, std = _constants(normalize.of(images.shape[1]), images.device)
    return (images - mean) / std


@cache
def _constants(normalize: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept, since copying them for each batch would make an accelerator wait."""
    mean, std = torch.tensor(normalize.mean), torch.tensor(normalize.std)
    return mean.view(-1, 1, 1).to(device), std.view(-1, 1, 1).to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode is restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def predict(
    model: nn.Module, images: Images, normalize: Normalization, *, batch: int = 250
) -> Tensor:
    """Logits `[n, C]`, float32 on the CPU, of images `[n, H, W, C]`, on the model's device.

    Raises:
        DataError: images of another shape or type, or a network that is no classifier.
    """

    def forward(units: Tensor) -> Tensor:
        return class_logits(model(normalize_unit(units, normalize)))

    return predict_units(model, forward, images, batch)


def class_logits(answer: Any) -> Tensor:
    """The logits `[B, C]` of a classifier that answers with them, or with `[B, C, 1, 1]`.

    Raises:
        DataError: it answers with something else, of which there is no top-1.
    """
    found = leaves(answer)
    shapes = {name: list(t.shape) for name, t in found.items()}
    logits = next(iter(found.values())) if len(found) == 1 else None
    if logits is None or logits.ndim < 2 or math.prod(logits.shape[2:]) != 1:
        raise DataError(
            "top-1 needs a network that answers each image with one class: logits [N, classes] or "
            f"[N, classes, 1, 1], and nothing else. Got {shapes}. Other answers are judged by "
            "--metric agreement, or a metric of your own."
        )
    flat: Tensor = logits.flatten(1)
    return flat


CACHED_PIXELS = 2**18
"""Pixels of a batch, at most: beyond them activations leave the cache. MobileNetV2 takes four times
as long in batches of 120 pictures of 224 pixels a side as in batches of 4."""


def predict_units(
    model: nn.Module, forward: Callable[[Tensor], Any], images: Images, batch: int
) -> Tensor:
    """As `predict`, with `forward` mapping images in 0..1 to logits `[..., B, C]`; joined in B.

    Large images come in smaller batches than `batch` (`CACHED_PIXELS`).
    """
    check_images(images)
    batch = max(1, min(batch, CACHED_PIXELS // (images.shape[1] * images.shape[2])))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    parts = []
    with evaluating(model):
        for some in slices(images, batch):
            logits: Tensor = forward(to_unit(as_tensor(some).to(device)))
            parts.append(logits.float().cpu())
    return torch.cat(parts, dim=-2)


def accuracy(
    model: nn.Module,
    images: Images,
    labels: Labels,
    normalize: Normalization,
    *,
    batch: int = 250,
) -> float:
    """Top-1 accuracy in percent.

    Raises:
        DataError: images of another shape or type, or not one label for each; a network that is no
            classifier.
    """
    check_images(images, labels)
    return top1(predict(model, images, normalize, batch=batch), labels)


def top1(logits: Tensor, labels: Labels) -> float:
    """Percent of rows of `[n, C]` whose largest entry is the label."""
    return 100 * float((logits.argmax(1) == as_tensor(labels)).double().mean())


def check_fits(model: nn.Module, images: Images, normalize: Normalization) -> None:
    """Refuse images that the network cannot take, before anything is written or trained.

    Raises:
        DataError: it fails on the first of them.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        try:
            model(normalize_unit(to_unit(as_tensor(images[:1]).to(device)), normalize))
        except RuntimeError as error:
            _, height, width, channels = images.shape
            raise DataError(
                f"the network must take images of {channels} channels and {height} x {width} "
                f"pixels, as these data have, but fails: {str(error).splitlines()[0]} Images are "
                f"[n, H, W, C]. Got {images.dtype} {list(images.shape)}."
            ) from error


def check_images(images: Images, labels: Labels | None = None, *, partial: bool = False) -> None:
    """Refuse what the loop and the evaluation cannot take.

    Raises:
        DataError: not uint8 `[n, H, W, C]`, nor float32 `[n, H, W, C]` as a network takes it, with
            n >= 1; or labels that are not int `[n]`, >= 0 (or,
            with `partial`, -1).
    """
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32) or not len(images):
        raise DataError(
            "images must be uint8 [n, H, W, C], or float32 [n, H, W, C] as the network takes them, "
            "with at least one image. "
            f"Got {images.dtype} {list(images.shape)}."
        )
    if labels is None:
        return
    least = -1 if partial else 0
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < least:
        raise DataError(
            f"labels must be {len(images)} class ids (integers >= {least}), one for each image. "
            f"Got {labels.dtype} {list(labels.shape)}"
            + (f", smallest {labels.min()}." if labels.size else ".")
        )
