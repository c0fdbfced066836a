from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpq import policies
from mpq.errors import ExportError, PolicyError
from mpq.export import to_onnx
from mpq.export.certify import Certificate, certify
from mpq.graph.passes import prepare
from mpq.layers import LayerChoice, Operation
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.spec import DYNAMIC, WIDTHS, activation_spec, weight_spec
from mpq.target import Target
from mpq.targets import ONNXRUNTIME_AVX2 as AVX2
from mpq.targets import ONNXRUNTIME_CPU, get_target, this_target


@pytest.mark.parametrize("weight", [*WIDTHS, None])
@pytest.mark.parametrize("activation", [*WIDTHS, None])
def test_integer_kernels_exist_for_eight_bits_and_fewer(weight: int | None, activation: int | None):
    support = get_target("onnxruntime-cpu").support(LayerChoice.at("a", weight, activation))
    integer = all(bits is not None and bits <= 8 for bits in (weight, activation))
    assert support.integer is integer
    assert support.stored == (None if weight is None else weight_spec(weight))
    assert bool(support.reason) is not integer


def test_unknown_target_names_the_nearest():
    with pytest.raises(PolicyError, match="Got 'onnxruntime-gpu'; did you mean onnxruntime-cpu"):
        get_target("onnxruntime-gpu")


def test_a_width_that_a_target_lacks():
    bare = Target("bare", frozenset(), widths=(8,))
    assert bare.support(LayerChoice.at("a", 8, None)).reason
    with pytest.raises(PolicyError, match=r"target bare has no W4A32 layer. It has those of 8"):
        bare.support(LayerChoice.at("a", 4, None))


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (Operation("conv", grouped=True, strided=True, dilated=True), ""),
        (Operation("linear"), ""),
        (Operation("conv_transpose", strided=True), ""),
        (Operation("conv_transpose", dilated=True), ""),
        (Operation("conv_transpose", grouped=True), "in groups has no integer form"),
        (Operation("conv_transpose", strided=True, dilated=True), "both stride and dilation"),
    ],
)
def test_what_a_layer_computes_decides_too(operation: Operation, reason: str):
    support = ONNXRUNTIME_CPU.support(LayerChoice.at("a", 4, 8), operation)
    assert support.integer is not bool(reason)
    assert reason in support.reason
    assert support.stored == weight_spec(4)


def test_only_linear_layers_take_their_range_at_run_time():
    dynamic = LayerChoice("a", weight_spec(8), DYNAMIC)
    assert ONNXRUNTIME_CPU.support(dynamic, Operation("linear")).integer
    with pytest.raises(PolicyError, match="layer a must be uint8/tensor: only linear layers"):
        ONNXRUNTIME_CPU.support(dynamic, Operation("conv"))
    with pytest.raises(PolicyError, match="only other layers have a kernel"):
        Target("bare", frozenset()).support(dynamic, Operation("linear"))


def test_an_operation_is_computed_or_moved_not_both():
    assert not ONNXRUNTIME_CPU.integer_ops & ONNXRUNTIME_CPU.moving_ops


# -- without VNNI: two products are added in 16 bits, saturating --------------------------------


def saturating_product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`x @ w.T` of uint8 and int8 as AVX2 does it: pairs in 16 bits (saturating), then 32 bits."""
    pairs = x.astype(np.int32)[:, None, 0::2] * w[None, :, 0::2]
    pairs = pairs + x.astype(np.int32)[:, None, 1::2] * w[None, :, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(-1)


@pytest.mark.parametrize(("bits", "exact"), [(8, False), (7, True), (4, True)])
def test_seven_bits_never_saturate(bits: int, exact: bool):
    spec = AVX2.narrowed(weight_spec(8)) if bits == 7 else weight_spec(bits)
    assert spec.qmax < 1 << (bits - 1)
    x = np.full((1, 64), 255, np.uint8)
    for extreme in (spec.qmin, spec.qmax):
        w = np.full((1, 64), extreme, np.int32)
        assert (saturating_product(x, w) == x.astype(np.int32) @ w.T).all() == exact
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (500, 64)).astype(np.uint8)
    w = draw.integers(spec.qmin, spec.qmax + 1, (32, 64)).astype(np.int32)
    assert (saturating_product(x, w) == x.astype(np.int32) @ w.T).all() == exact


def exported(
    target: str, folder: Path, *, verified: bool = False
) -> tuple[np.ndarray, Certificate]:
    """Integer weights of a layer of a W8A8 network made for a target, and the certificate."""
    policy = Policy(target=target)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = prepare(net.eval(), policy, images)
    calibrate(graph, images, method="minmax")
    seen = images if verified else None
    result = to_onnx(graph, folder / "m.onnx", images=seen, target=AVX2.name)
    assert certify(folder / "m.onnx", target=AVX2.name).notes == result.certificate.notes
    assert result.certificate.integer_macs_fraction == 1
    return graph.module.get_submodule("2").integers().flatten(1).numpy(), result.certificate


def test_eight_bit_weights_take_seven_bits_where_they_would_saturate(tmp_path: Path):
    x = np.full((1, 72), 255, np.uint8)
    narrow, certificate = exported(AVX2.name, tmp_path, verified=True)
    assert narrow.min() >= -64
    assert narrow.max() == 63
    assert (saturating_product(x, narrow) == x.astype(np.int32) @ narrow.T).all()
    assert {row.asked for row in certificate.layers} == {"W8A8"}
    assert {row.stored for row in certificate.layers} == {"INT8"}
    assert certificate.notes == ()
    wide, certificate = exported(ONNXRUNTIME_CPU.name, tmp_path)
    assert wide.max() == 127
    assert not (saturating_product(x, wide) == x.astype(np.int32) @ wide.T).all()
    assert len(certificate.notes) == 1
    assert "2 layers (0, 2) have weights beyond 7 bits" in certificate.notes[0]


@pytest.mark.skipif(not this_target().saturates, reason="this CPU has VNNI: nothing saturates")
def test_a_file_for_other_cpus_is_refused_where_it_saturates(tmp_path: Path):
    with pytest.raises(ExportError, match=r"steps off .* beyond 7 bits: .* Quantize with `target:"):
        exported(ONNXRUNTIME_CPU.name, tmp_path, verified=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(this_target().saturates, reason="here a file for other CPUs is refused")
def test_other_cpus_run_either_exactly(tmp_path: Path):
    exported(ONNXRUNTIME_CPU.name, tmp_path, verified=True)


def test_a_policy_without_a_target_is_for_this_computer():
    here = this_target().name
    assert Policy().target == Policy.uniform(8).target == here
    assert policies.load("w8a8").target == here
    assert f"target: {here}" in Policy.uniform(8).to_yaml()


def test_only_eight_bit_weights_of_integer_layers_are_narrowed():
    layers = [LayerPolicy(name="b", weight=weight_spec(4), reason="tough")]
    layers += [LayerPolicy(name="c", weight=weight_spec(16), activation=activation_spec(16))]
    layers += [LayerPolicy(name="d", weight=weight_spec(8), activation="float")]
    chosen = Policy(target=AVX2.name, layers=layers).resolve(["a", "b", "c", "d"])
    assert [c.weight_bits for c in chosen.values()] == [8, 4, 16, 8]
    assert [bool(c.weight and c.weight.reduced) for c in chosen.values()] == [1, 0, 0, 0]
    assert "8-bit weights take 7 bits" in chosen["a"].reason
    assert chosen["b"].reason == "tough"
