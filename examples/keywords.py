"""Keywords: a 1-d network that tells tones from chirps, judged by a metric of one's own.

Inputs are signals `[N, 1, T]`. The metric is a function of outputs and batch that gives a value for
each sample, so that `mpq` knows how sure a difference is.
"""

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import mpq

WORDS = ["low", "high", "rising", "falling"]


def signals(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals `[N, 1, 256]` with noise, and which of `WORDS` each of them is."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 4, (count,), generator=generator)
    time = torch.linspace(0, 1, 256)
    begin, end = (torch.tensor(f)[words][:, None] for f in ([8.0, 24, 8, 24], [8.0, 24, 24, 8]))
    turns = begin * time + (end - begin) * time**2 / 2
    phase = torch.rand(count, 1, generator=generator)
    noise = 0.5 * torch.randn(count, 256, generator=generator)
    return (torch.sin(2 * torch.pi * (turns + phase)) + noise)[:, None], words


def network() -> nn.Module:
    """Three 1-d convolutions and a classifier."""
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, stride=2, padding=4), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Conv1d(16, 32, 9, stride=2, padding=4), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Conv1d(32, 32, 9, stride=4, padding=4), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 4),
    )  # fmt: skip


def right(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """100 or 0 for each signal."""
    return 100.0 * (outputs.argmax(1) == batch[1])


torch.manual_seed(0)
model, (x, y) = network(), signals(512, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    at = torch.randint(len(x), (64,))
    optimizer.zero_grad()
    F.cross_entropy(model(x[at]), y[at]).backward()
    optimizer.step()
model.eval()

test = [signals(128, seed=1)]
graph = mpq.prepare(mpq.to_float(model, x[:2]), mpq.Policy.uniform(4, 8))
mpq.quantize_graph(graph, x[:256])
with torch.no_grad():
    figures = {name: float(right(net(test[0][0]), test[0]).mean())
               for name, net in (("float", model), ("trained", graph.module))}  # fmt: skip
print(f"float {figures['float']:.2f} %")
print(f"trained {figures['trained']:.2f} % after 4-bit quantization")
print(mpq.export(graph, "model.onnx"))

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(None, {session.get_inputs()[0].name: test[0][0].numpy()})[0]
print("heard:", [WORDS[k] for k in np.argmax(logits, 1)[:4]])
