"""Ranges on known distributions, rounding against its own objective, biases, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from nets import NETS, build, images
from torch import Tensor, nn

from mpq.errors import GraphError, UsageError
from mpq.graph.passes import freeze, outputs, prepare, to_float
from mpq.numerics import choose_qparams, sqnr_db
from mpq.policy import Policy
from mpq.ptq import METHODS, calibrate, quantize_graph, quantize_layers
from mpq.ptq.observe import Histogram, choose_range
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.quant.operation import LayerOp
from mpq.quant.ranges import CLIP_RATIOS, best_ratio
from mpq.quant.rounding import (
    Gram,
    input_vectors,
    output_error,
    refine,
    round_rows,
    scales_by_output,
    target_weights,
)
from mpq.spec import activation_spec, weight_spec


def histogram(x: torch.Tensor) -> Histogram:
    seen = Histogram()
    seen.widen(x)
    seen.count(x)
    return seen


def test_of_a_large_tensor_every_nth_value_is_counted_and_the_extremes_are_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mpq.ptq.observe.MAX_VALUES", 1000)
    x = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    x[3, 7, 15, 14] = 9.0  # not among the counted
    seen = histogram(x)
    assert seen.high == 9.0
    assert seen.counts.sum() == len(range(0, x.numel(), 9))
    spread = (seen.counts * seen.centers.square()).sum() / seen.counts.sum()
    assert float(spread) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_a_range_includes_zero_and_stays_within_the_extremes(method: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = choose_range(histogram(x), activation_spec(4), method)  # type: ignore[arg-type]
    assert float(x.min()) <= low <= 0 < high <= float(x.max())


def test_minmax_keeps_an_outlier_and_the_others_cut_it_off() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    x[0] = 10.0
    found = {m: choose_range(histogram(x), activation_spec(4), m)[1] for m in METHODS}  # type: ignore[arg-type]
    assert found["minmax"] == 10.0
    assert found["percentile"] < 1.1
    assert found["mse"] < 5


def test_kl_cuts_a_tail_off() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs().pow(3)
    assert choose_range(histogram(x), activation_spec(4), "kl")[1] < 0.9 * float(x.max())


def problem(correlated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 6, 24, generator=generator)
    x = torch.randn(1, 24, 500, generator=generator)
    if correlated:
        x = x + 2 * torch.randn(1, 1, 500, generator=generator)
    return w, x @ x.transpose(1, 2)


def test_pixels_keep_their_grid_when_the_brightest_are_not_seen() -> None:
    pixels = torch.randint(16, 241, (5000,)) / 255
    assert choose_range(histogram(pixels), activation_spec(8), "mse") == (0.0, 1.0)
    smooth = torch.rand(5000) * 240 / 255
    assert choose_range(histogram(smooth), activation_spec(8), "mse")[1] < 0.95


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sequential_rounding_beats_nearest_on_the_output(bits: int) -> None:
    w, h = problem(correlated=True)
    spec = weight_spec(bits)
    scale, _ = choose_qparams(w.amin(-1), w.amax(-1), spec)
    nearest = torch.round(w / scale[..., None]).clamp(spec.qmin, spec.qmax) * scale[..., None]
    rounded = round_rows(w, scale, h, spec) * scale[..., None]
    found, plain = (float(output_error(q - w, h).sum()) for q in (rounded, nearest))
    assert found < 0.7 * plain


def test_no_row_is_worse_than_nearest() -> None:
    w, h = problem(correlated=True)
    spec = weight_spec(4)
    # Chosen for rounding to nearest, so that it is hard to beat.
    scale = scales_by_output(w, partial(output_error, h=h), spec)
    nearest = torch.round(w / scale[..., None]).clamp(spec.qmin, spec.qmax) * scale[..., None]
    rounded = round_rows(w, scale, h, spec) * scale[..., None]
    errors = [(((q - w) @ h) * (q - w)).sum(-1) for q in (rounded, nearest)]
    assert bool((errors[0] <= errors[1] * 1.0001).all())


def test_rounded_weights_are_integers_of_the_format() -> None:
    w, h = problem(correlated=False)
    q = round_rows(
        w, scales_by_output(w, partial(output_error, h=h), weight_spec(3)), h, weight_spec(3)
    )
    assert torch.equal(q, q.round())
    assert float(q.min()) >= -4
    assert float(q.max()) <= 3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_search_that_stops_early_finds_what_the_whole_search_finds(bits: int) -> None:
    w, h = problem(correlated=True)
    scale, tried = w.abs().amax(-1) / 2 ** (bits - 1), []

    def error(ratio: float) -> torch.Tensor:
        tried.append(ratio)
        q = torch.round(w / (scale * ratio)[..., None]).clamp(
            -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        )
        return output_error(q * (scale * ratio)[..., None] - w, h)

    early, count = best_ratio(error), len(tried)
    assert torch.equal(early, best_ratio(error, stop_ratio=float("inf")))
    assert bits < 8 or count < len(CLIP_RATIOS)


@pytest.mark.parametrize("vectors", [0, 1, 40])
def test_fewer_input_vectors_than_inputs(vectors: int) -> None:
    """A classifier over 1,280 features and a few images: their second moment is singular."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 3, 1280, generator=generator)
    x = torch.randn(1, 1280, vectors, generator=generator).relu() * 30
    h = x @ x.transpose(1, 2)
    spec = weight_spec(4)
    scale = scales_by_output(w, partial(output_error, h=h), spec)
    q = round_rows(w, scale, h, spec)
    found, steps = refine(w, q, scale, h, spec)
    for integers in (q, found):
        assert torch.equal(integers, integers.round().clamp(-8, 7))
    assert bool((steps > 0).all() and steps.isfinite().all())


def test_a_few_input_vectors_are_no_matrix_and_cost_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices: list[Tensor] = []

    def by_matrix(off: Tensor, h: Tensor) -> Tensor:
        matrices.append(h)
        return output_error(off, h)

    monkeypatch.setattr("mpq.quant.rounding.output_error", by_matrix)
    generator = torch.Generator().manual_seed(0)
    off = torch.randn(2, 5, 64, generator=generator)
    parts = [torch.randn(2, 64, 20, generator=generator) for _ in range(4)]
    moments = Gram(2, 64)
    for seen, part in enumerate(parts, start=1):
        moments.add(part, part)
        x = torch.cat(parts[:seen], dim=2)
        assert torch.allclose(moments.error(off), (off @ x).square().sum(-1), rtol=1e-4)
        assert bool(matrices) == (20 * seen >= 64)
    assert torch.allclose(moments.quantized, x @ x.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refinement_lowers_the_error_of_every_row(bits: int) -> None:
    w, h = problem(correlated=True)
    spec = weight_spec(bits)
    scale = scales_by_output(w, partial(output_error, h=h), spec)
    q = round_rows(w, scale, h, spec)
    found, steps = refine(w, q, scale, h, spec)
    off = q * scale[..., None] - w, found * steps[..., None] - w
    before, after = (((d @ h) * d).sum(-1) for d in off)
    assert bool((after <= before * 1.001).all())
    assert float(after.sum()) < 0.98 * float(before.sum())


def test_the_target_makes_up_for_a_scaled_input() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(1, 4, 8, generator=generator), torch.randn(1, 8, 4000, generator=generator)
    moments = Gram(1, 8)
    moments.add(0.8 * x, x)
    wanted = target_weights(w, moments)
    assert torch.allclose(wanted @ (0.8 * x), w @ x, atol=0.25)
    same = Gram(1, 8)
    same.add(x, x)
    assert torch.allclose(target_weights(w, same), w, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2),
        nn.Conv2d(4, 8, (1, 3), groups=2),
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Linear(9, 5),
    ],
)
def test_input_vectors_times_weights_is_the_layer(layer: nn.Module) -> None:
    shape = {nn.Conv2d: (2, 4, 9, 9), nn.Conv1d: (2, 4, 9), nn.Linear: (7, 9)}[type(layer)]
    x, op = torch.randn(shape), LayerOp.of(layer)
    weight: torch.Tensor = layer.weight.detach()  # type: ignore[assignment,union-attr,operator]
    columns = input_vectors(op, weight, x, thin=1)
    groups = columns.shape[0]
    y = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns
    wanted = op.float(x, weight, None)
    wanted = wanted.T if op.kind == "linear" else wanted.transpose(0, 1)
    assert torch.allclose(y.reshape(weight.shape[0], -1), wanted.flatten(1), atol=1e-4)


def test_bias_correction_removes_the_mean_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()).eval()
    x = torch.rand(32, 3, 8, 8)
    means = {}
    for correct in (False, True):
        graph = prepare(net, Policy.uniform(2, 8), x)
        calibrate(graph, x)
        quantize_layers(graph, x, learn_rounding=False, correct_bias=correct)
        error = (graph.module(x) - net(x)).reshape(32, 8, -1)
        means[correct] = float(error.detach().mean((0, 2)).abs().max())
    assert means[True] < 0.1 * means[False]


@pytest.mark.parametrize("name", NETS)
def test_it_works_on_everything_that_the_passes_take(name: str) -> None:
    batch = images(16, seed=3)
    floats = to_float(build(name), batch)
    graph = quantize_graph(prepare(floats, Policy.uniform(8)), batch)
    wanted, got = floats.module(batch), graph.module(batch)
    assert float(((wanted - got).pow(2).mean() / wanted.var()).detach()) < 0.05
    assert torch.equal(freeze(graph).module(batch), got)


def test_an_absorbed_relu6_keeps_its_ceiling() -> None:
    batch = 20 * images(8)
    graph = prepare(build("depthwise"), Policy.uniform(8), batch)
    calibrate(graph, batch, method="minmax")
    capped = [m for m in graph.module.modules() if isinstance(m, FakeQuant) and m.ceiling]
    assert capped
    assert all(float(m.step().detach()) * m.spec.qmax <= 6.0001 for m in capped)


def test_effort_fast_chooses_ranges_scales_and_biases_by_few_of_many_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = images(24, seed=1)
    floats = to_float(build("residual"), batch)

    def state(values: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("mpq.ptq.FAST_VALUES", values)
        graph = prepare(floats, Policy.uniform(4, 8))
        return quantize_graph(graph, batch, effort="fast").module.state_dict()

    by_all, by_few = state(batch.numel()), state(9 * batch[0].numel())
    graph = prepare(floats, Policy.uniform(4, 8))
    calibrate(graph, batch[:9])  # as the walk does on its way, in passes of their own
    quantize_layers(graph, batch[:9], learn_rounding=False)
    wanted = graph.module.state_dict()
    assert all(torch.equal(by_few[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(by_all[name], wanted[name]) for name in wanted)


def test_effort_good_is_better_than_fast_at_three_bits() -> None:
    batch = images(64, seed=1)
    floats = to_float(build("residual"), batch)
    errors = {}
    for effort in ("fast", "good"):
        graph = quantize_graph(prepare(floats, Policy.uniform(3, 8)), batch, effort=effort)  # type: ignore[arg-type]
        off = (graph.module(batch) - floats.module(batch)).detach()
        errors[effort] = float(off.pow(2).mean())
    assert errors["good"] < errors["fast"]


def test_weights_stay_on_the_grid_that_was_chosen() -> None:
    batch = images(16)
    graph = quantize_graph(prepare(build("plain"), Policy.uniform(4, 8), batch), batch)
    layers = [m for m in graph.module.modules() if isinstance(m, QuantLayer)]
    assert layers
    for layer in layers:
        q = layer.integers()
        assert int(q.min()) >= -8
        assert int(q.max()) <= 7


def test_what_is_refused() -> None:
    batch = images(4)
    floats = to_float(build("plain"), batch)
    prepared = prepare(floats, Policy.uniform(8))
    with pytest.raises(UsageError, match="calibration must be one of"):
        calibrate(prepared, batch, method="median")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one image"):
        calibrate(prepared, batch[:0])
    with pytest.raises(GraphError, match="needs a prepared graph"):
        calibrate(floats, batch)
    with pytest.raises(UsageError, match="effort must be one of"):
        quantize_graph(prepared, batch, effort="heroic")  # type: ignore[arg-type]


def test_a_nan_is_named_by_the_quantizer_that_sees_it() -> None:
    batch = images(4)
    prepared = prepare(build("plain"), Policy.uniform(8), batch)
    batch[0, 0, 0, 0] = float("nan")
    with pytest.raises(GraphError, match=r"the input of quantizers\.\w+ must be finite"):
        calibrate(prepared, batch)


@pytest.mark.parametrize("gamma", [0.0, 1e-12, 1e-6])
@pytest.mark.parametrize("effort", ["fast", "good"])
def test_a_channel_without_weights_keeps_its_bias(gamma: float, effort: str) -> None:
    """Its integer bias would overflow at the scale of its weights; trained nets have such ones."""
    batch = images(16)
    net = build("residual")
    with torch.no_grad():
        net.bn2.weight[:3], net.bn2.bias[:3] = gamma, torch.tensor([1.0, 0.1, 3.0])  # type: ignore[union-attr,operator,index]
    graph = quantize_graph(prepare(net, Policy.uniform(8), batch), batch, effort=effort)  # type: ignore[arg-type]
    found = outputs(freeze(graph), ["conv2"], batch)["conv2"][:, :3]
    assert torch.allclose(found.amin((0, 2, 3)), torch.tensor([1.0, 0.1, 3.0]), rtol=1e-4)
    assert torch.allclose(found.amax((0, 2, 3)), torch.tensor([1.0, 0.1, 3.0]), rtol=1e-4)


def test_calls_of_a_shared_layer_are_quantized_apart() -> None:
    """The weights that suit the second call must not overwrite those of the first."""
    batch = images(32)
    floats = to_float(build("shared"), batch)
    first, second = [n for n in floats.layers if n.startswith("conv")][:2]
    assert floats.module.get_submodule(first).weight is floats.module.get_submodule(second).weight
    graph = quantize_graph(prepare(floats, Policy.uniform(4, 8)), batch)
    got, wanted = (outputs(g, [first], batch)[first] for g in (freeze(graph), floats))
    assert sqnr_db(wanted, got) > 15
    for name in (first, second):
        layer = graph.module.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        on_grid = layer.integers() * layer.step()[:, None, None, None]
        assert torch.allclose(on_grid, layer.weight, atol=1e-6)
