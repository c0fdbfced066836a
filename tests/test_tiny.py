"""The product on one page: a network in, two training steps, an integer file out that answers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import mpq
from mpq.export import runtime, to_onnx


class Net(nn.Module):
    """A stem, a residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)
        return self.fc(x.mean((2, 3)))


def test_the_whole_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, images, labels = Net().eval(), torch.randn(64, 3, 8, 8), torch.arange(64) % 4

    graph = mpq.to_float(net, images)
    assert torch.allclose(graph.module(images), net(images), atol=1e-4)

    scores = mpq.score_layers(graph, images)
    policy = mpq.build_policy(
        mpq.Search(scores).allocate(mpq.Constraints(effective_bits=6)), scores
    )
    assert mpq.Policy.from_yaml(policy.to_yaml()) == policy
    widths = {c.weight_bits for c in policy.resolve(list(graph.layers)).values()}
    assert widths == {8, 4}

    quantized = mpq.prepare(graph, policy)
    mpq.quantize_graph(quantized, images)
    quantized.module.train()
    optimizer = torch.optim.SGD(quantized.module.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(quantized.module(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]

    quantized.module.eval()
    frozen = mpq.freeze(quantized)
    assert torch.equal(quantized.module(images), frozen.module(images))

    result = to_onnx(frozen, tmp_path / "tiny.onnx", images=images)
    assert [row.executed for row in result.certificate.layers] == ["QLinearConv"] * 3 + ["QGemm"]
    assert result.certificate.integer_macs_fraction == 1.0
    answers = runtime.run(runtime.session(result.path), images.numpy())
    assert (answers.argmax(1) == frozen.module(images).argmax(1).numpy()).all()
