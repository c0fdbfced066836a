"""Wide ResNets for 32x32 images (Zagoruyko and Komodakis 2016, arXiv:1605.07146).

WRN-d-k has 3 stages of (d - 4) / 6 pre-activation blocks with 16k, 32k and 64k channels. Module
names are those of the common public checkpoints: `block1.layer.0.conv1`, `convShortcut`, `fc`.
"""

from __future__ import annotations

from torch import Tensor, nn

from mpq.zoo.resnet import init_weights


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice; a 1x1 convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.convShortcut = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        # A projection reads the activated input, an identity the raw one.
        residual = x if self.convShortcut is None else self.convShortcut(active)
        total: Tensor = out + residual
        return total


class WideStage(nn.Module):
    """Blocks of one width; the first has the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, depth: int) -> None:
        super().__init__()
        first = WideBlock(inputs, outputs, stride)
        rest = [WideBlock(outputs, outputs, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, inputs, H, W]` to `[B, outputs, H/stride, W/stride]`."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`; `depth` is 6n + 4. No dropout."""

    def __init__(self, depth: int, widen: int, *, classes: int, in_channels: int = 3) -> None:
        super().__init__()
        n = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(16, 16 * widen, 1, depth=n)
        self.block2 = WideStage(16 * widen, 32 * widen, 2, depth=n)
        self.block3 = WideStage(32 * widen, 64 * widen, 2, depth=n)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * widen, classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, C, H, W]` to logits `[B, classes]`."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        out: Tensor = self.fc(self.avgpool(self.relu(self.bn1(x))).flatten(1))
        return out
