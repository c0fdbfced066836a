"""The data and the network of the examples: handwritten digits of 8x8 pixels, grey."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def loaders() -> tuple[DataLoader, DataLoader]:
    """Loaders of (images `[N, 1, 8, 8]`, class ids `[N]`), to train and to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:1400], labels[:1400])
    test = TensorDataset(images[1400:], labels[1400:])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=64)


def network() -> nn.Module:
    """Two convolutions and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def accuracy(module: nn.Module, loader: DataLoader) -> float:
    """Percent of a loader's images in the right class."""
    module.eval()
    with torch.no_grad():
        right = [(module(x).argmax(1) == y).float() for x, y in loader]
    return 100 * float(torch.cat(right).mean())
