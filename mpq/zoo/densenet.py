"""DenseNets for 32x32 images (Huang et al. 2017, arXiv:1608.06993).

DenseNet-BC-L-k: three dense blocks of (L - 4) / 6 bottleneck layers with growth k, halving the
channels between blocks. DenseNet-121 here keeps the four blocks of the ImageNet network behind
a 3x3 stem of stride 1 without pooling. Module names: `dense1.0.conv1`, `trans1.conv`, `linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpq.zoo.resnet import init_weights


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 to 4k channels, norm, ReLU, 3x3 to k channels, put before the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, growth + inputs, H, W]`."""
        out = self.conv1(self.relu1(self.bn1(x)))
        out = self.conv2(self.relu2(self.bn2(out)))
        return torch.cat((out, x), 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution, mean over 2x2 pixels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/2, W/2]`."""
        out: Tensor = self.pool(self.conv(self.relu(self.bn(x))))
        return out


class DenseNet(nn.Module):
    """Stem of 2k channels, dense blocks `dense1..N` with transitions `trans1..N-1` between.

    Args:
        depths: layers of each dense block.
        growth: channels that each layer adds, k.
        classes: number of outputs.
        in_channels: channels of the image.
    """

    def __init__(
        self, depths: Sequence[int], growth: int, *, classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        self.parts: list[str] = []
        for i, depth in enumerate(depths, start=1):
            layers = [DenseLayer(channels + j * growth, growth) for j in range(depth)]
            self._append(f"dense{i}", nn.Sequential(*layers))
            channels += depth * growth
            if i < len(depths):
                self._append(f"trans{i}", Transition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, classes)
        init_weights(self)

    def _append(self, name: str, part: nn.Module) -> None:
        self.add_module(name, part)
        self.parts.append(name)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, classes]`."""
        x = self.conv1(x)
        for name in self.parts:
            x = getattr(self, name)(x)
        out: Tensor = self.linear(self.avgpool(self.relu(self.bn(x))).flatten(1))
        return out


def densenet_bc(depth: int, growth: int, *, classes: int, in_channels: int = 3) -> DenseNet:
    """DenseNet-BC of `depth` layers: three equal blocks, `depth` is 6n + 4."""
    n = (depth - 4) // 6
    return DenseNet([n] * 3, growth, classes=classes, in_channels=in_channels)
