"""What several benchmarks need: the answers of a file, and on what they were measured."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from mpq.cpu import this_cpu
from mpq.data import Normalization
from mpq.export import runtime
from mpq.policy import LayerPolicy, Policy
from mpq.spec import activation_spec
from mpq.targets import this_target

HALF = 5000
"""Choices are made on the first half of CIFAR's test images by official index."""
UNIFORM = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w4a4r8": (4, 4)}
"""Bits of all weights and activations, but see `uniform`; with `r8` residual sums have 8 bits."""


def uniform(configuration: str, layers: Iterable[str]) -> Policy:
    """One of `UNIFORM` for a network with these layers, in order.

    With narrow activations the image stays at 8 bits, which it has anyway. Published W4A4 figures
    do as much for the whole first and last layer.
    """
    policy = Policy.uniform(*UNIFORM[configuration])
    if UNIFORM[configuration][1] >= 8:
        return policy
    image = LayerPolicy(
        name=next(iter(layers)), activation=activation_spec(8), reason="images have 8 bits"
    )
    default = policy.default.replace(residual_bits=8 if configuration.endswith("r8") else None)
    return policy.replace(layers=[image], default=default)


def answers(path: Path, images: NDArray[np.uint8], normalize: Normalization) -> NDArray[np.int64]:
    """The class that a model file gives each image, in onnxruntime at its defaults."""
    loaded = runtime.session(path)
    parts = np.array_split(images, max(1, len(images) // 1000))
    found = [runtime.run(loaded, normalize.apply(part)).argmax(1) for part in parts]
    return np.concatenate(found)


def accuracy_of(answered: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, float]:
    """Top-1 in percent on all images and, of CIFAR's, on the first half and on the rest."""
    right = answered == labels
    parts = {"top1": right}
    if len(right) > HALF:
        parts |= {"top1_first_5000": right[:HALF], "top1_last_5000": right[HALF:]}
    return {name: round(100 * float(part.mean()), 2) for name, part in parts.items()}


def setting() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "machine": f"{this_cpu().name}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "target": this_target().name,
    }
