"""The networks of this zoo by name, for small images; torchvision's keep their own names.

Order matters in one place: should the weights of a checkpoint fit several, the first is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Protocol

from torch import nn

from mpq.zoo.densenet import DenseNet, densenet_bc
from mpq.zoo.mobilenet import MobileNetV2
from mpq.zoo.resnet import cifar_resnet, resnext29, wide_stem_resnet
from mpq.zoo.wide_resnet import WideResNet


class Constructor(Protocol):
    """Makes one network."""

    def __call__(self, *, classes: int, in_channels: int = 3) -> nn.Module:
        """Build it with random weights."""


_DEPTHS = (8, 20, 32, 44, 56, 110)

ARCHITECTURES: Mapping[str, Constructor] = MappingProxyType(
    {
        **{f"resnet{d}": partial(cifar_resnet, d, shortcut="pad") for d in _DEPTHS},
        **{f"resnet{d}_conv": partial(cifar_resnet, d, shortcut="conv") for d in _DEPTHS},
        "resnet18_cifar": partial(wide_stem_resnet, 18),
        "resnet34_cifar": partial(wide_stem_resnet, 34),
        "resnet50_cifar": partial(wide_stem_resnet, 50),
        "mobilenet_v2_cifar": MobileNetV2,
        "wrn_16_4": partial(WideResNet, 16, 4),
        "wrn_28_4": partial(WideResNet, 28, 4),
        "wrn_28_10": partial(WideResNet, 28, 10),
        "wrn_40_2": partial(WideResNet, 40, 2),
        "densenet_bc_100_12": partial(densenet_bc, 100, 12),
        "densenet_bc_190_40": partial(densenet_bc, 190, 40),
        "densenet121_cifar": partial(DenseNet, (6, 12, 24, 16), 32),
        "resnext29_8x64d": partial(resnext29, 8, 64),
    }
)
INPUT_SIZE = (32, 32)
