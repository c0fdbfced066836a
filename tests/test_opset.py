"""A model is written in another opset, or refused with what that opset lacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnxtext import answer, ops, parse
from torch import Tensor, nn

from mpq import to_float
from mpq.errors import ExportError
from mpq.export.edit import run
from mpq.export.form import Form
from mpq.export.lower import lower
from mpq.export.onnx_file import serialize
from mpq.export.opset import set_opset, steps

OLD = Form(int4="unpack", opset=18, ir=8)


def test_what_both_opsets_have_is_kept():
    model = parse("(float[2] x) => (float[2] y) { y = Clip(x, low) }", low=np.float32(0))
    before = answer(model, x=np.float32([-1, 1]))
    set_opset(model, OLD)
    assert (model.opset_imports[""], model.ir_version) == (18, 8)
    assert np.array_equal(answer(model, x=np.float32([-1, 1])), before)


@pytest.mark.parametrize(
    ("node", "lacks"),
    [
        ("Gelu(x)", "Gelu,"),
        ('Gelu<approximate="tanh">(x)', "Gelu with approximate=tanh,"),
        ("QuantizeLinear<output_dtype=2>(x, s)", "QuantizeLinear with output_dtype=2,"),
        ("GroupNormalization<num_groups=1>(x, s, s)", "GroupNormalization with a scale per"),
        ('Pad<mode="wrap">(x, n)', "Pad with mode=wrap,"),
        ("DFT(x, n, n)", "DFT with 3 inputs,"),
    ],
)
def test_what_an_opset_lacks_is_named(node: str, lacks: str):
    model = parse(f"(float[2] x) => (float[2] y) {{ y = {node} }}", s=np.float32(1), n=np.int64(0))
    with pytest.raises(ExportError, match=f"opset 18 has no {lacks}.*which this network needs"):
        set_opset(model, OLD)
    assert model.opset_imports[""] == 21


def test_operators_of_other_domains_are_not_judged():
    model = parse("(float[2] x) => (float[2] y) { y = com.microsoft.QuickGelu(x) }")
    set_opset(model, OLD)
    assert model.opset_imports[""] == 18


@pytest.mark.parametrize(
    ("text", "operator"),
    [
        ("GroupNormalization<num_groups=2, epsilon=0.1>(x, scale, bias)", "GroupNormalization"),
        ('Pad<mode="wrap">(x, pads)', "Pad"),
        ('Gelu<approximate="tanh">(x)', "Gelu"),
        ("Gelu(x)", "Gelu"),
    ],
)
def test_what_an_older_opset_says_otherwise_is_rewritten(text: str, operator: str):
    model = parse(
        f"(float[2, 4, 3, 5] x) => (float[N, C, H, W] y) {{ y = {text} }}",
        scale=np.float32([1, -2, 3, 0.5]),
        bias=np.float32([0, 1, 2, 3]),
        pads=np.int64([0, 0, 2, 0, 0, 0, 1, 4]),
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
    before = answer(model, x=x)
    run(model, steps(OLD))
    set_opset(model, OLD)
    assert operator not in ops(model)
    np.testing.assert_allclose(answer(model, x=x), before, rtol=1e-5, atol=1e-5)


def test_modes_of_a_grid_have_the_names_of_their_opset():
    text = 'y = GridSample<mode="cubic">(x, grid)'
    shapes = "(float[1, 1, 4, 4] x, float[1, 2, 2, 2] grid) => (float[1, 1, 2, 2] y)"
    model = parse(f"{shapes} {{ {text} }}")
    draw = np.random.default_rng(0)
    feeds = {
        "x": draw.normal(size=(1, 1, 4, 4)).astype(np.float32),
        "grid": draw.uniform(-1, 1, (1, 2, 2, 2)).astype(np.float32),
    }
    before = answer(model, **feeds)
    set_opset(model, OLD)
    np.testing.assert_allclose(answer(model, **feeds), before, rtol=1e-5)


Function = Callable[[Tensor], Tensor]
OPERATIONS: dict[str, Function] = {
    "group norm": nn.GroupNorm(2, 8),
    "instance norm": nn.InstanceNorm2d(8, affine=True),
    "layer norm": nn.LayerNorm(6),
    "gelu": F.gelu,
    "gelu by tanh": nn.GELU("tanh"),
    "mish": F.mish,
    "hard-swish": F.hardswish,
    "softplus": F.softplus,
    "circular": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, size=(7, 7), mode="bicubic", align_corners=True),
    "antialiased": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
    "grid": lambda x: F.grid_sample(
        x, x[:, :2].permute(0, 2, 3, 1), mode="bicubic", align_corners=False
    ),
    "largest": lambda x: x.amax((2, 3)),
    "spread": lambda x: x.std(1),
    "average": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True, padding=1),
    "largest few": lambda x: x.flatten(1).topk(3)[0],
    "sum so far": lambda x: x.cumsum(1),
}


class Every(nn.Module):
    """All of them on one tensor, their values in a row; what each gives is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.modules_of = nn.ModuleList(m for m in OPERATIONS.values() if isinstance(m, nn.Module))
        self.sizes: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        found = {name: function(x).flatten(1) for name, function in OPERATIONS.items()}
        self.sizes = {name: t.shape[1] for name, t in found.items()}
        return torch.cat(list(found.values()), 1)


@pytest.mark.parametrize("form", [OLD, Form(opset=25, ir=13)], ids=["opset 18", "opset 25"])
def test_operations_mean_the_same_in_every_opset(form: Form):
    torch.manual_seed(0)
    net, x = Every().eval(), torch.randn(3, 3, 8, 8)
    for norm in net.modules_of:
        for weight in norm.parameters():
            nn.init.uniform_(weight, 0.5, 2)
    expected = net(x).detach()
    data = serialize(lower(to_float(net, x), form))
    answers = ort.InferenceSession(data).run(None, {"input": x.numpy()})[0]
    sizes = list(net.sizes.values())
    parts = zip(net.sizes, torch.from_numpy(answers).split(sizes, 1), expected.split(sizes, 1),
                strict=True)  # fmt: skip
    apart = {name: float((one - other).abs().max()) for name, one, other in parts}
    assert not {name: far for name, far in apart.items() if not far < 1e-3}
