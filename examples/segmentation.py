"""Segmentation: discs among noise, quantized under mean IoU, trained by the float network.

The float network teaches on pictures without masks; masks are looked at only to measure. What the
file gives are logits: the choice of a class for each pixel is left to numpy.
"""

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import mpq

SIDE = 32


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures `[N, 1, H, W]` with a bright disc and a dark one, and masks `[N, H, W]`."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(count, 2, 2, 1, 1, generator=generator) * (SIDE - 12) + 6
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    bright, dark = (((grid - place[:, k]) ** 2).sum(1) < 25 for k in (0, 1))
    masks = torch.where(bright, 1, torch.where(dark, 2, 0))
    values = torch.tensor([0.5, 0.8, 0.2])[masks]
    return (values + 0.15 * torch.randn(masks.shape, generator=generator))[:, None], masks


def network() -> nn.Module:
    """Down by two, and up again to logits of three classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )  # fmt: skip


torch.manual_seed(0)
model, (x, y) = network(), pictures(256, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(80):
    at = torch.randint(len(x), (32,))
    optimizer.zero_grad()
    F.cross_entropy(model(x[at]), y[at]).backward()
    optimizer.step()
model.eval()

test = [tuple(part) for part in zip(*(t.split(32) for t in pictures(64, seed=1)), strict=True)]
policy = mpq.Policy.uniform(4, 8)  # weights of 4 bits, activations of 8
quantized = mpq.ptq(model, x, policy, validation=test, metric="miou")
settings = {"batch": 32, "optimizer": "adamw", "lr": 3e-4, "crop": 0.0}
trained = mpq.qat(model, x, policy, validation=test, metric="miou", epochs=2, settings=settings)
before, after = quantized.metrics["value"], trained.metrics["value"]
print(f"float {quantized.metrics['float_value']:.2f} %, quantized {before:.2f} %")
print(f"trained {after:.2f} % mean IoU")
print(mpq.export(trained, "model.onnx", data=test[0][0]))

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(None, {session.get_inputs()[0].name: test[0][0].numpy()})[0]
found = logits.argmax(1)  # the class of each pixel
print(f"pixels in the right class: {100 * np.mean(found == test[0][1].numpy()):.2f} %")
