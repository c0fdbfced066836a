"""ResNets and ResNeXts for 32x32 images.

Two shortcuts where a block changes the shape (He et al. 2016, arXiv:1512.03385, section 3.3):

    pad    take every second pixel, fill the new channels with zeros on both sides: no parameters
    conv   1x1 convolution and batch norm, called `downsample.0` and `downsample.1`

Module names follow the public checkpoints: `linear` is the classifier beside `pad`, `fc` beside
`conv`; everything else is named as in torchvision, so the ResNet-18, 34 and 50 here differ from
torchvision's in the stem alone (3x3, stride 1, no max pooling). Pooling is global: any input
size that is a multiple of the total stride will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "conv"]


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Channels into a block, inside it and out of it, its stride and convolution groups."""

    inputs: int
    inner: int
    outputs: int
    stride: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.inputs, self.inner, self.outputs, self.stride, self.groups) < 1:
            raise ValueError(f"every field of BlockShape must be at least 1. Got {self} instead.")

    @property
    def keeps_shape(self) -> bool:
        """Whether the input can be added to the output as it is."""
        return self.stride == 1 and self.inputs == self.outputs


class PadShortcut(nn.Module):
    """Parameter-free shortcut (option A): every second pixel, zero channels on both sides."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.stride = shape.stride
        self.extra = (shape.outputs - shape.inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra, self.extra))


def conv_shortcut(shape: BlockShape) -> nn.Sequential:
    """Projection shortcut (option B)."""
    return nn.Sequential(
        nn.Conv2d(shape.inputs, shape.outputs, 1, shape.stride, bias=False),
        nn.BatchNorm2d(shape.outputs),
    )


def _shortcut(shape: BlockShape, kind: Shortcut) -> nn.Module | None:
    if shape.keeps_shape:
        return None
    return PadShortcut(shape) if kind == "pad" else conv_shortcut(shape)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; ReLU after the sum."""

    def __init__(self, shape: BlockShape, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape.inputs, shape.outputs, 3, shape.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(shape.outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(shape.outputs, shape.outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(shape.outputs)
        self.downsample = _shortcut(shape, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        total: Tensor = self.relu2(out + residual)
        return total


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, maybe grouped), 1x1 convolutions; ReLU after the sum."""

    def __init__(self, shape: BlockShape, shortcut: Shortcut) -> None:
        super().__init__()
        inner = shape.inner
        self.conv1 = nn.Conv2d(shape.inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, shape.stride, 1, groups=shape.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, shape.outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(shape.outputs)
        self.downsample = _shortcut(shape, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        total: Tensor = self.relu3(out + residual)
        return total


class ResNet(nn.Module):
    """3x3 stem, stages `layer1..N` (stride 2 from the second on), global mean, classifier.

    Args:
        stages: for each stage, the shapes of its blocks.
        block: the kind of block.
        shortcut: what a block does where its shape changes; names the classifier too.
        classes: number of outputs.
        in_channels: channels of the image.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[BlockShape]],
        block: type[BasicBlock] | type[Bottleneck],
        *,
        shortcut: Shortcut,
        classes: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        stem, features = stages[0][0].inputs, stages[-1][-1].outputs
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.stages = [f"layer{i + 1}" for i in range(len(stages))]
        for name, shapes in zip(self.stages, stages, strict=True):
            setattr(self, name, nn.Sequential(*(block(s, shortcut) for s in shapes)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier_name = "linear" if shortcut == "pad" else "fc"
        setattr(self, self.classifier_name, nn.Linear(features, classes))
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, classes]`."""
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        out: Tensor = getattr(self, self.classifier_name)(self.avgpool(x).flatten(1))
        return out


def init_weights(module: nn.Module) -> None:
    """He initialization of every convolution (fan out, ReLU gain); the rest stays as it is."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def stage_shapes(
    inputs: int, widths: Sequence[int], depths: Sequence[int], *, expansion: int = 1
) -> list[list[BlockShape]]:
    """Blocks of each stage: `widths` inside, times `expansion` outside; later stages halve."""
    stages = []
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        outputs = width * expansion
        first = BlockShape(inputs, width, outputs, stride=1 if i == 0 else 2)
        stages.append([first] + [BlockShape(outputs, width, outputs)] * (depth - 1))
        inputs = outputs
    return stages


def cifar_resnet(depth: int, *, shortcut: Shortcut, classes: int, in_channels: int = 3) -> ResNet:
    """ResNet of 6n + 2 layers and 16, 32, 64 channels (He et al. 2016, section 4.2)."""
    stages = stage_shapes(16, (16, 32, 64), [(depth - 2) // 6] * 3)
    return ResNet(stages, BasicBlock, shortcut=shortcut, classes=classes, in_channels=in_channels)


def wide_stem_resnet(depth: int, *, classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-18, 34 or 50 of ImageNet width with the stem for small images."""
    depths = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}[depth]
    bottleneck = depth == 50
    stages = stage_shapes(64, (64, 128, 256, 512), depths, expansion=4 if bottleneck else 1)
    block = Bottleneck if bottleneck else BasicBlock
    return ResNet(stages, block, shortcut="conv", classes=classes, in_channels=in_channels)


def resnext29(groups: int, width: int, *, classes: int, in_channels: int = 3) -> ResNet:
    """ResNeXt-29 with `groups` paths of `width` channels (Xie et al. 2017, arXiv:1611.05431)."""
    stages = []
    inputs = 64
    for i in range(3):
        inner, outputs = groups * width * 2**i, 256 * 2**i
        first = BlockShape(inputs, inner, outputs, stride=1 if i == 0 else 2, groups=groups)
        rest = BlockShape(outputs, inner, outputs, groups=groups)
        stages.append([first, rest, rest])
        inputs = outputs
    return ResNet(stages, Bottleneck, shortcut="conv", classes=classes, in_channels=in_channels)
