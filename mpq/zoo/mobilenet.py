"""MobileNetV2 for 32x32 images (Sandler et al. 2018, arXiv:1801.04381).

The variant that is usual for CIFAR: stride 1 in the stem and in the second stage, a 1x1
convolution as shortcut where a block of stride 1 changes the channels, an expansion layer even
where it expands by 1, and plain ReLU in place of ReLU6. 2,296,922 parameters for 10 classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from mpq.zoo.resnet import init_weights

# expansion, channels, blocks, stride of the first block
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.residual = stride == 1
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
            if self.residual and inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        inner = self.relu1(self.bn1(self.conv1(x)))
        inner = self.relu2(self.bn2(self.conv2(inner)))
        out: Tensor = self.bn3(self.conv3(inner))
        if not self.residual:
            return out
        total: Tensor = out + (x if self.shortcut is None else self.shortcut(x))
        return total


class MobileNetV2(nn.Module):
    """Stem of 32 channels, 17 inverted residuals, 1280 features, global mean, classifier."""

    def __init__(self, *, classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        blocks, inputs = [], 32
        for expansion, outputs, depth, first in _STAGES:
            for i in range(depth):
                stride = first if i == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, expansion=expansion, stride=stride))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, classes]`."""
        x = self.layers(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        out: Tensor = self.linear(self.avgpool(x).flatten(1))
        return out
