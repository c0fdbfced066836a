"""Networks that mpq does not know, as a user would hand them over: `--model module:factory`.

resnet_stage_relu: a CIFAR ResNet without ReLU after the sum inside a stage, one after each stage.
mlperf_tiny_resnet8: the image classifier of MLPerf Tiny (Banbury et al. 2021, arXiv:2106.07597),
with the padding of TensorFlow and images as 0..255.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class StageBlock(nn.Module):
    """Two 3x3 convolutions and a sum without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        out = F.relu(self.bn1(self.conv1(x)))
        total: Tensor = self.bn2(self.conv2(out)) + self.shortcut(x)
        return total


class StageReluResNet(nn.Module):
    """Stem of 64 channels, stages of 16, 32, 64, each followed by one ReLU, 4x4 pooling windows."""

    def __init__(self, depth: int, *, classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 16, 1, blocks=blocks)
        self.layer2 = _stage(16, 32, 2, blocks=blocks)
        self.layer3 = _stage(32, 64, 2, blocks=blocks)
        self.linear = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, 3, 32, 32]` to logits `[B, classes]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.layer1(x))
        x = F.relu(self.layer2(x))
        x = F.relu(self.layer3(x))
        logits: Tensor = self.linear(F.avg_pool2d(x, 4).flatten(1))
        return logits


def _stage(inputs: int, outputs: int, stride: int, *, blocks: int) -> nn.Sequential:
    first = StageBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(StageBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet_stage_relu_20(classes: int = 100) -> nn.Module:
    """Twenty layers."""
    return StageReluResNet(20, classes=classes)


def resnet_stage_relu_32(classes: int = 100) -> nn.Module:
    """Thirty-two layers."""
    return StageReluResNet(32, classes=classes)


class TinyBlock(nn.Module):
    """Two 3x3 convolutions with bias; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        # TensorFlow's "same" pads an even input of stride 2 at the right and the bottom only.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 0 if stride == 2 else 1)
        self.bn1 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        out = F.relu(self.bn1(self.conv1(self.pad(x))))
        return F.relu(self.bn2(self.conv2(out)) + self.short(x))


class TinyResNet8(nn.Module):
    """A stem and three blocks of 16, 32 and 64 channels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1)
        self.bn = nn.BatchNorm2d(16, eps=1e-3)
        self.b1 = TinyBlock(16, 16, 1)
        self.b2 = TinyBlock(16, 32, 2)
        self.b3 = TinyBlock(32, 64, 2)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, 3, 32, 32]`, values 0..255, to logits `[B, classes]`."""
        x = F.relu(self.bn(self.conv(x)))
        x = self.b3(self.b2(self.b1(x)))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def mlperf_tiny_resnet8(classes: int = 10) -> nn.Module:
    """ResNet-8 of MLPerf Tiny."""
    return TinyResNet8(classes)


def leaky_mobilenet(classes: int = 10) -> nn.Module:
    """MobileNetV1 x0.25 (Howard et al. 2017, arXiv:1704.04861) with LeakyReLU, for 32 pixels.

    The kind of network that face detectors stand on, where depthwise layers meet an activation
    that is not flat below zero (slope 0.1). The stem keeps the size and three layers halve it.
    """
    widths = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    widths += [(128, 128, 1)] * 5 + [(128, 256, 1), (256, 256, 1)]
    return nn.Sequential(
        _leaky(3, 8, 3),
        *(
            nn.Sequential(_leaky(i, i, 3, stride=s, groups=i), _leaky(i, o, 1))
            for i, o, s in widths
        ),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(256, classes),
    )


def _leaky(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))
