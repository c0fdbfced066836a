"""Quantize a network and train it on, in a loop of your own."""

import torch
import torch.nn.functional as F
from digits import accuracy, loaders, network

import mpq


def train(module: torch.nn.Module, loader: torch.utils.data.DataLoader, epochs: int, lr: float):
    """An ordinary loop: it knows nothing of quantization."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        module.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()


torch.manual_seed(0)
training, test = loaders()
model = network()
train(model, training, epochs=3, lr=0.05)

found = mpq.analyze(model, training, budget=4.5)  # which layer gets how many bits
quantized = mpq.ptq(model, training, found)
before = accuracy(quantized.module, test)
train(quantized.module, training, epochs=1, lr=0.005)  # the same loop, at these bits
result = mpq.export(quantized, "model.onnx", data=test)

print(f"float {accuracy(model, test):.2f} %, quantized {before:.2f} %, "
      f"trained {accuracy(quantized.module, test):.2f} %")  # fmt: skip
print(mpq.bench(result.path, test, runs=20))
