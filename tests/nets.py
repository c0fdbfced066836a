"""Tiny networks, one per shape of graph that mpq must take, and a calibration for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.graph.ir import QuantGraph
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer

CLASSES = 5


def conv_bn(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Head(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_bn(3, 8), nn.ReLU(), nn.MaxPool2d(2), *conv_bn(8, 12), nn.ReLU(inplace=True)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))


class Residual(nn.Module):
    """A stem and a basic block; one ReLU module is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8)
        self.conv2, self.bn2 = conv_bn(8, 8)
        self.conv3, self.bn3 = conv_bn(8, 8)
        self.relu = nn.ReLU()
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(x)))
        y = self.bn3(self.conv3(y))
        y += x
        return self.head(self.relu(y))


class Depthwise(nn.Module):
    """An inverted residual with ReLU6, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU6())
        self.expand = nn.Sequential(*conv_bn(8, 16, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(*conv_bn(16, 16, groups=16), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(*conv_bn(16, 8, 1))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.project(self.depthwise(self.expand(x))))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat(tensors=[F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        return self.head(F.relu(self.mix(both)))


class SqueezeExcite(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.gate = gate
        self.project = nn.Conv2d(8, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = self.gate(self.up(F.relu(self.down(self.pool(x)))))
        return self.head(F.relu(self.project(x * scale)))


class Shared(nn.Module):
    """One convolution called twice, beside a module that has the name of the second call's copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv_2 = nn.Conv2d(3, 8, 3, padding=1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(F.relu(self.conv(x))))
        return self.head(F.relu(self.conv_2(x)))


class Functional(nn.Module):
    """No modules at all: parameters and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.bias1 = nn.Parameter(torch.randn(8) / 5)
        self.weight2 = nn.Parameter(torch.randn(8, 4, 3, 3) / 6)
        self.weight3 = nn.Parameter(torch.randn(CLASSES, 8 * 9) / 8)
        self.bias3 = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.weight1, self.bias1, padding=1))
        x = F.dropout(x, 0.5, self.training)
        x = F.relu(F.conv2d(input=x, weight=self.weight2, stride=2, padding=1, groups=2))
        x = F.avg_pool2d(x, 2)
        return F.linear(x.view(x.size(0), -1), self.weight3, self.bias3)


class GlobalMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean(dim=[2, 3]))


class Gate(nn.Module):
    """Branches on values, so fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 1)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 100:
            return x
        x = self.up(F.relu(self.conv(x)))
        return self.mix(x.transpose(1, 3)).transpose(1, 3)


class Island(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.gate = Gate()
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.stem(x)))


class UntraceableRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the message must show
            return self.conv(x)
        return -self.conv(x)


class PreActivation(nn.Module):
    """Batch norm and ReLU before the convolution: the norm after an addition cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(y)))
        return self.head(F.relu(self.bn3(x)))


class OneDimension(nn.Module):
    """A 1d convolution over the rows of an image, folded with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(36, 8, 3, padding="same"), nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8 * 5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x.flatten(1, 2))))
        return self.fc(F.relu(self.conv2(x)).flatten(1))


class Transposed(nn.Module):
    """Upsampling; the second one has groups, where output channels lie in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*conv_bn(3, 8, stride=2), nn.ReLU())
        self.up1, self.bn1 = nn.ConvTranspose2d(8, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.up2, self.bn2 = nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 8, 3)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.up1(self.down(x))))
        x = F.relu(self.bn2(self.up2(x)))
        return self.head(F.relu(self.out(x)))


class Shuffle(nn.Module):
    """Operations that only move values: split, pad, transpose, slice, reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3)
        self.last = nn.Conv2d(8, 8, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        right = F.relu(self.branch(F.pad(right, (1, 1, 1, 1))))
        x = torch.cat((left, right), 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        x = x.reshape(batch, channels, height, width)[:, :, ::2, ::2]
        return self.head(F.relu(self.last(x)))


class Gated(nn.Module):
    """SiLU and hard-swish, as modules and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.SiLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardswish(self.conv(self.stem(x))))


class Attention(nn.Module):
    """Self-attention of 16 patches, as torchvision's vision transformer calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 3, 3)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(16) for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.fc(self.norm3(x)[:, 0])


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "depthwise": Depthwise,
    "concat": Concat,
    "se_sigmoid": lambda: SqueezeExcite(nn.Sigmoid()),
    "se_hardsigmoid": lambda: SqueezeExcite(nn.Hardsigmoid()),
    "shared": Shared,
    "functional": Functional,
    "global_mean": GlobalMean,
    "island": Island,
    "pre_activation": PreActivation,
    "one_dimension": OneDimension,
    "transposed": Transposed,
    "shuffle": Shuffle,
    "gated": Gated,
    "attention": Attention,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A network in eval mode whose batch norms have statistics worth folding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NETS[name]()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 1.5)
    return model.eval()


def images(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def calibrate(qg: QuantGraph, batch: Tensor) -> QuantGraph:
    """Give every quantizer the range that it sees with all quantizers passing floats through."""
    parts = [m for m in qg.module.modules() if isinstance(m, (FakeQuant, QuantLayer))]
    sites = [m for m in parts if isinstance(m, FakeQuant)]
    handles = [
        m.register_forward_pre_hook(lambda m, args: m.set_range(args[0].amin(), args[0].amax()))
        for m in sites
    ]
    for part in parts:
        part.enabled = False
    qg.module.eval()(batch)
    for part in parts:
        part.enabled = True
    for handle in handles:
        handle.remove()
    return qg


MINE = """
import numpy as np
import torch
from torch import nn

def tiny(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )

tiny.input_size = (3, 8, 8)

def images():
    labels = np.arange(120) % 10
    return np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), np.uint8), labels
"""
"""Code of a user's own: a network and its images."""
