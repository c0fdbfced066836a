"""A width end to end: weights and activations of 7 bits, from the search to onnxruntime."""

from __future__ import annotations

from pathlib import Path

import click
import nets
import numpy as np
import onnx
from click.testing import CliRunner
from onnx import numpy_helper

import mpq
from mpq.analyze import cost
from mpq.analyze.score import Scoring
from mpq.cli import options
from mpq.export import to_onnx
from mpq.export.certify import certify
from mpq.export.exact import verify_exact
from mpq.layers import Widths
from mpq.targets import ONNXRUNTIME_CPU

SEVEN = mpq.Policy.model_validate(
    {"default": {"weight": "int7/channel", "activation": "uint7/tensor"}}
)


def all_at(graph: mpq.QuantGraph, bits: int) -> dict[str, Widths]:
    return dict.fromkeys(graph.layers, (bits, bits))


def test_the_options_take_it():
    @click.command()
    @options.widths("--bits", "8", "")
    @options.widths("--act-bits", "8", "")
    def command(bits: tuple[int, ...], act_bits: tuple[int, ...]) -> None:
        click.echo(f"{bits} {act_bits}")

    found = CliRunner().invoke(command, ["--bits", "8,7", "--act-bits", "7"])
    assert found.output == "(8, 7) (7,)\n"


def test_the_search_chooses_it_where_eight_bits_are_too_many():
    graph = mpq.to_float(nets.build("residual"), nets.images(4))
    how = Scoring(bits=(8, 7), act_bits=(8, 7))
    scores = mpq.score_layers(graph, nets.images(16), how=how)
    bitops = mpq.Constraints(max_bops=cost.bitops(scores.layers, all_at(graph, 7)) / 1e9)
    found = mpq.Search(scores).allocate(bitops)  # no room but for 7 bits everywhere, or nearly
    policy = mpq.build_policy(found, scores)
    chosen = mpq.Policy.from_yaml(policy.to_yaml()).resolve(list(graph.layers)).values()
    assert 7 in {c.weight_bits for c in chosen} | {c.activation_bits for c in chosen}
    assert all(ONNXRUNTIME_CPU.support(c).integer for c in chosen)


def test_the_file_holds_seven_bits_and_runs_as_integers(tmp_path: Path):
    floats = mpq.to_float(nets.build("residual"), nets.images(4))
    graph = mpq.quantize_graph(mpq.prepare(floats, SEVEN), nets.images(16), method="minmax")
    images = nets.images(24, seed=3)
    result = to_onnx(graph, tmp_path / "m.onnx", images=images)
    told = {(r.asked, r.stored, r.stored_bits) for r in certify(result.path).layers}
    assert told == {("W7A7", "UINT8", 7)}
    assert result.certificate.integer_macs_fraction == 1.0
    assert result.verification is not None
    assert result.verification.max_own_step <= 1
    model = onnx.load(result.path)
    constants = {t.name: t for t in model.graph.initializer}
    clips = [n for n in model.graph.node if n.op_type == "Clip"]
    bounds = {tuple(int(numpy_helper.to_array(constants[i])) for i in n.input[1:]) for n in clips}
    assert bounds == {(0, 127)}
    assert len(clips) == sum(site.spec.bits == 7 for site in graph.sites.values()) > 2


def test_its_integers_are_predicted_bit_for_bit(tmp_path: Path):
    floats = mpq.to_float(nets.build("plain"), nets.images(4))
    graph = mpq.quantize_graph(mpq.prepare(floats, SEVEN), nets.images(16), method="minmax")
    path = to_onnx(graph, tmp_path / "m.onnx").path
    report = verify_exact(path, nets.images(4, seed=5).numpy())
    assert report.exact
    assert not report.unpredicted()
    weights = graph.module.get_submodule(next(iter(graph.layers))).integers().numpy()
    assert weights.min() >= -64
    assert weights.max() == 63
    assert np.unique(weights).size > 16
