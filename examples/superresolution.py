"""Super-resolution: a network that doubles the side of pictures, trained with a loss of one's own.

The loss sees batches as a training loop has them, here pairs of small and large pictures; the
metric is PSNR, and the best epoch is kept.
"""

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpq


def pairs(count: int, seed: int) -> TensorDataset:
    """Small pictures `[N, 1, 16, 16]` of soft edges, and the same at twice the side."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.linspace(-1, 1, 32)
    a, b, c = torch.randn(3, count, 1, 1, generator=generator)
    large = torch.sigmoid(12 * (a * line[:, None] + b * line + 0.3 * c))[:, None]
    return TensorDataset(F.avg_pool2d(large, 2), large)


class Doubling(nn.Module):
    """Convolutions at the small side, then four channels become one of twice the side."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(16, 4, 3, padding=1))  # fmt: skip
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A picture of twice the side."""
        return self.shuffle(self.body(x))


def absolute(outputs: torch.Tensor, batch: list[torch.Tensor]) -> torch.Tensor:
    """The loss: the mean absolute difference from the large pictures."""
    return (outputs - batch[1]).abs().mean()


torch.manual_seed(0)
model = Doubling()
loader = DataLoader(pairs(256, seed=0), batch_size=32, shuffle=True)
test = DataLoader(pairs(64, seed=1), batch_size=32)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(20):
    for batch in loader:
        optimizer.zero_grad()
        absolute(model(batch[0]), batch).backward()
        optimizer.step()
model.eval()

found = mpq.analyze(model, loader, budget=6.0, loss=absolute)
quantized = mpq.ptq(model, loader, found, validation=test, metric="psnr")
trained = mpq.qat(model, loader, found, loss=absolute, metric="psnr", validation=test, epochs=3,
                  settings={"optimizer": "adamw", "lr": 3e-4})  # fmt: skip
before, after, whole = (quantized.metrics["value"], trained.metrics["value"],
                        quantized.metrics["float_value"])  # fmt: skip
print(f"float {whole:.2f} dB, quantized {before:.2f} dB, trained {after:.2f} dB")
print(f"trained {100 * after / whole:.2f} % of the float network's PSNR")
small, large = next(iter(test))
print(mpq.export(trained, "model.onnx", data=small))

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
answer = session.run(None, {session.get_inputs()[0].name: small.numpy()})[0]
picture = (255 * answer).round().clip(0, 255).astype(np.uint8)  # the pixels of a file
error = np.mean((picture / 255 - large.numpy()) ** 2)
print(f"the file, in whole pixels: {-10 * np.log10(error):.2f} dB")
