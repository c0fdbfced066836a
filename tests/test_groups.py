from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from nets import Head
from torch import Tensor, nn

import mpq
from mpq.export import lower as lowering
from mpq.export import runtime, to_onnx
from mpq.export.groups import best_merge


@pytest.mark.parametrize(
    ("groups", "outputs", "terms", "merge"),
    [
        (6, 8, 72, 6),  # RegNetY-400MF, first stage: 850 us as it is, 362 us as one group
        (26, 8, 72, 2),  # third stage: 244 us, 150 us
        (55, 8, 72, 5),  # fourth stage: 127 us, 84 us
        (32, 4, 36, 8),  # ResNeXt-50 32x4d, first stage: 4,242 us, 1,160 us
        (4, 256, 2304, 1),  # wide groups fill the kernel
    ],
)
def test_groups_are_merged_as_measured(groups: int, outputs: int, terms: int, merge: int) -> None:
    assert best_merge(groups, outputs, terms) == merge


class Grouped(nn.Module):
    """Grouped convolutions of several widths, depthwise and pointwise ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3)
        self.narrow = nn.Conv2d(24, 48, 3, padding=1, groups=12)
        self.prime = nn.Conv2d(48, 33, 3, stride=2, groups=3)
        self.depthwise = nn.Conv2d(33, 33, 3, groups=33)
        self.pointwise = nn.Conv2d(33, 32, 1)
        self.grouped_pointwise = nn.Conv2d(32, 32, 1, groups=8)
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.children())[:-1]:
            x = torch.relu(layer(x))
        return self.head(x)


def exported(bits: int, path: Path) -> tuple[onnx.ModelProto, Tensor]:
    torch.manual_seed(0)
    images, policy = torch.randn(16, 3, 16, 16), mpq.Policy.uniform(bits, 8)
    graph = mpq.prepare(Grouped().eval(), policy, images)
    result = to_onnx(mpq.quantize_graph(graph, images), path, images=images)
    assert {row.executed for row in result.certificate.layers} == {"QLinearConv", "QGemm"}
    assert result.certificate.layers[1].macs == 48 * 2 * 9 * 14 * 14
    return onnx.load(path), images


def unmerged(graph: ir.Graph) -> int:
    return 0


def groups(model: onnx.ModelProto) -> dict[str, int]:
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    return {n.name: next((a.i for a in n.attribute if a.name == "group"), 1) for n in convs}


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_merged_groups_run_with_the_same_bits(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, images = exported(bits, tmp_path / "merged.onnx")
    monkeypatch.setattr(lowering, "merge_groups", unmerged)
    plain, _ = exported(bits, tmp_path / "plain.onnx")
    was, now = groups(plain), groups(merged)
    assert was["narrow"] == 12
    assert was["prime"] == 3
    assert now["narrow"] < 12
    assert now["prime"] == 1
    same = ("stem", "depthwise", "pointwise", "grouped_pointwise")
    assert [now[name] for name in same] == [was[name] for name in same] == [1, 33, 1, 8]
    assert merged.ByteSize() < plain.ByteSize() + 600
    ran = [
        runtime.run(runtime.session(m.SerializeToString()), images.numpy(), batch=16)
        for m in (merged, plain)
    ]
    assert np.array_equal(*ran)


def test_the_form_for_other_runtimes_keeps_its_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, policy = torch.randn(16, 3, 16, 16), mpq.Policy.uniform(4, 8)
    graph = mpq.quantize_graph(mpq.prepare(Grouped().eval(), policy, images), images)
    path = tmp_path / "dq.onnx"
    to_onnx(graph, path, images=images, int4_format="dq", allow_float_fallback=True)
    model = onnx.load(path)
    assert groups(model)["narrow"] == 12
    assert "BitwiseAnd" not in {node.op_type for node in model.graph.node}
