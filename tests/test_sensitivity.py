from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from mpq.analyze import Scoring, Sensitivity, score_layers
from mpq.analyze.batches import Batches
from mpq.analyze.fisher import TEMPERATURE, fisher_terms
from mpq.analyze.perturb import Column, Perturbations, perturb
from mpq.analyze.score import METRICS
from mpq.checkpoint import load_model, weights_hash
from mpq.data import Normalization, open_data, sample_indices
from mpq.errors import DataError, GraphError, PolicyError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float
from mpq.numerics import choose_qparams, fake_quantize
from mpq.outputs import direction
from mpq.quant.ranges import activation_range, weight_scales
from mpq.spec import QuantSpec, activation_spec, weight_spec


class Net(nn.Module):
    """Every kind of layer, a tensor with two readers, and operations in place."""

    def __init__(self, up_groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.deep = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.side = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=up_groups)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.relu(self.norm(self.deep(x)))
        y += self.side(x)
        return self.head(self.up(torch.relu_(y)).mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > -1e9 else x


LABELS = torch.arange(24) % 5
LAYERS = ["stem", "deep", "side", "up", "head"]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


@pytest.fixture
def graph(net: nn.Module, images: Tensor) -> QuantGraph:
    return to_float(net, images[:2])


# -- ranges ------------------------------------------------------------------------------------


def errors(weight: Tensor, scale: Tensor, spec: QuantSpec, axis: int = 0) -> Tensor:
    approx = fake_quantize(weight, scale, torch.zeros_like(scale), spec, axis)
    return (approx - weight).square().transpose(0, axis).flatten(1).sum(1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_searched_scales_lose_no_more_than_the_range(bits: int, axis: int) -> None:
    weight, spec = (
        torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(2)),
        weight_spec(bits),
    )
    flat = weight.transpose(0, axis).flatten(1)
    plain, _ = choose_qparams(flat.amin(1), flat.amax(1), spec)
    scale = weight_scales(weight, spec, axis)
    assert scale.shape == (weight.shape[axis],)
    best, before = errors(weight, scale, spec, axis), errors(weight, plain, spec, axis)
    assert bool((best <= before).all())
    if bits <= 4:
        assert float(best.sum()) < 0.95 * float(before.sum())
    dense = torch.stack([errors(weight, plain * r, spec, axis) for r in np.linspace(0.4, 1, 200)])
    # A finer search finds little more; a channel of 45 values at 6 bits jumps about.
    assert float(best.sum()) < 1.06 * float(dense.amin(0).sum())


def test_eight_bit_scales_are_the_range() -> None:
    weight, spec = torch.randn(4, 7), weight_spec(8)
    expected, _ = choose_qparams(weight.amin(1), weight.amax(1), spec)
    assert torch.equal(weight_scales(weight, spec), expected)


def test_importance_moves_the_scale_towards_what_matters() -> None:
    weight, spec = torch.tensor([[0.1, -0.12, 0.09, 0.11, 1.0]]), weight_spec(4)
    heavy = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-6])
    plain = weight_scales(weight, spec)
    assert float(weight_scales(weight, spec, second_moment=heavy)) < float(plain)


def test_one_scale_per_tensor() -> None:
    weight, spec = torch.randn(4, 7), QuantSpec(4, True, "tensor")
    scale = weight_scales(weight, spec)
    assert scale.shape == ()
    assert float(scale) > 0


def test_an_empty_channel_has_a_positive_scale() -> None:
    assert bool((weight_scales(torch.zeros(2, 3), weight_spec(4)) > 0).all())


def test_activation_range_clips_an_outlier_at_four_bits_only() -> None:
    values = torch.cat([torch.rand(5000), torch.tensor([4.0])])
    assert float(activation_range(values, activation_spec(8))[1]) == 4.0
    assert float(activation_range(values, activation_spec(4))[1]) < 3.0


def test_feedback_lowers_the_error_of_the_output(graph: QuantGraph, images: Tensor) -> None:
    """As post-training quantization rounds: worse weights, better outputs."""
    for bits in (4, 3):
        plain = perturb(graph, images, weight_bits=(8, bits), activation_bits=())
        found = perturb(
            graph, images, weight_bits=(8, bits), activation_bits=(), rounding="feedback"
        )
        for name in LAYERS:
            assert torch.equal(found.weights[name, 8], plain.weights[name, 8])
        errors = [noise_of(p, "side", bits, images) for p in (found, plain)]
        assert errors[0] < 0.9 * errors[1]
        # A transposed convolution is not a product over input vectors.
        assert torch.equal(found.weights["up", bits], plain.weights["up", bits])


def noise_of(candidates: Perturbations, layer: str, bits: int, images: Tensor) -> float:
    """Mean square that the noise of one layer's weights makes of its output."""
    seen: list[Tensor] = []
    module = candidates.graph.module.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    candidates.graph.module(images)
    handle.remove()
    out = torch.nn.functional.conv2d(seen[0], candidates.weights[layer, bits])
    return float(out.square().mean())


# -- fisher ------------------------------------------------------------------------------------


def test_block_terms_are_inner_products_with_the_gradient_of_each_image(
    graph: QuantGraph, images: Tensor
) -> None:
    candidates = perturb(graph, images, weight_bits=(8, 4), activation_bits=())
    columns: list[Column] = [(n, "weight", b) for n in LAYERS for b in (8, 4)]
    terms = fisher_terms(candidates, columns, Batches(images), seed=3)
    logits = graph.module(images)
    v = drawn(logits.detach(), TEMPERATURE, 3)
    for i in range(3):
        for column, (layer, _, bits) in enumerate(columns):
            weight = graph.module.get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            value = (graph.module(images[i : i + 1]) * v[i]).sum()
            (grad,) = torch.autograd.grad(value, weight)
            expected = (grad.double() * candidates.weights[layer, bits].double()).sum()
            assert float(terms.block[i, column]) == pytest.approx(
                float(expected), rel=1e-3, abs=1e-8
            )


def drawn(logits: Tensor, temperature: float, seed: int) -> Tensor:
    signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(seed))
    return direction("classes", logits, signs.float() * 2 - 1, temperature=temperature)


def test_directions_have_the_covariance_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.2, 2.0]])
    p = (logits / 2).softmax(1)[0]
    v = drawn(logits.expand(60_000, 4), 2.0, 0)
    expected = torch.diag(p) - p[:, None] * p
    assert (v.T @ v / len(v) - expected).abs().max() < 0.01


def test_the_block_form_is_the_divergence_of_a_small_change() -> None:
    head = nn.Linear(6, 4)
    with torch.no_grad():
        head.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(5)) / 4)
        head.bias.zero_()
    images = torch.randn(4000, 6, generator=torch.Generator().manual_seed(6))
    graph = to_float(head_only(head), images[:2])
    candidates = perturb(graph, images, weight_bits=(5,), activation_bits=())
    column: list[Column] = [("head", "weight", 5)]
    terms = fisher_terms(candidates, column, Batches(images, size=500), temperature=1.0)
    before = head(images).detach().log_softmax(1)
    noisy = torch.nn.functional.linear(
        images, head.weight + candidates.weights["head", 5], head.bias
    )
    noisy = noisy.detach().log_softmax(1)
    truth = float((before.exp() * (before - noisy)).sum(1).mean())
    assert float(terms.scores()[0]) == pytest.approx(truth, rel=0.08)


def head_only(head: nn.Linear) -> nn.Module:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return out

    return Head().eval()


def test_a_tensor_with_two_readers_is_counted_once(graph: QuantGraph, images: Tensor) -> None:
    found = score_layers(graph, images, how=Scoring(act_bits=(8, 4)))
    assert found.groups == (("deep", "side"),)
    deep, side = (found.score(n, "activation", 4) for n in ("deep", "side"))
    assert deep == side > 0
    candidates = perturb(graph, images, weight_bits=(8,), activation_bits=(4,))
    column: list[Column] = [("deep", "activation", 4)]
    terms = fisher_terms(candidates, column, Batches(images))
    whole = float(terms.scores()[0])
    assert deep + side == pytest.approx(whole, rel=1e-6)


def test_a_transposed_convolution_in_groups_reads_floats(graph: QuantGraph, images: Tensor) -> None:
    how = Scoring(act_bits=(4,))
    assert score_layers(graph, images, how=how).score("up", "activation", 4) > 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grouped = to_float(Net(up_groups=2).eval(), images)
    assert score_layers(grouped, images, how=how).score("up", "activation", 4) == 0.0


# -- analyze -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_every_candidate(
    metric: str, graph: QuantGraph, images: Tensor
) -> None:
    before = weights_hash(graph.module.state_dict())
    seen: list[tuple[int, int]] = []
    how = Scoring(bits=(16, 8, 4, 2), act_bits=(8, 4), metric=metric, batch=10)  # type: ignore[arg-type]
    found = score_layers(
        graph, images, LABELS, how, progress=lambda done, total: seen.append((done, total))
    )
    assert [info.name for info in found.layers] == LAYERS
    assert len(found.rows) == len(LAYERS) * (4 + 3)
    for name in LAYERS:
        scores = [found.score(name, "weight", bits) for bits in (16, 8, 4, 2)]
        if metric not in ("loss", "hawq"):  # these may find that noise helps: then 0
            assert scores == sorted(scores)
            assert scores[-1] > 0
        assert found.score(name, "activation", 16) == 0.0
    if metric != "sqnr":
        assert seen[-1][0] == seen[-1][1]
        assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert weights_hash(graph.module.state_dict()) == before
    assert all(not m._forward_hooks for m in graph.module.modules())
    assert all(p.requires_grad for p in graph.module.parameters())


def test_scores_repeat_with_the_seed_and_differ_without(graph: QuantGraph, images: Tensor) -> None:
    first, again = (score_layers(graph, images, how=Scoring(seed=4)) for _ in range(2))
    assert first == again
    other = score_layers(graph, images, how=Scoring(seed=5))
    assert other.rows != first.rows
    assert other.key != first.key


def test_one_at_a_time_is_the_true_divergence(
    net: nn.Module, graph: QuantGraph, images: Tensor
) -> None:
    found = score_layers(
        graph, images, how=Scoring(bits=(3,), metric="kl", batch=9, rounding="nearest")
    )
    reference = net(images).detach().log_softmax(1)
    for name in LAYERS:
        changed = graph.copy()
        weight = changed.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        spec, axis = weight_spec(3), 1 if name == "up" else 0
        scale = weight_scales(weight, spec, axis)
        with torch.no_grad():
            weight.copy_(fake_quantize(weight, scale, torch.zeros_like(scale), spec, axis))
            noisy = changed.module(images).log_softmax(1)
        truth = float((reference.exp() * (reference - noisy)).sum(1).mean())
        assert found.score(name, "weight", 3) == pytest.approx(truth, rel=1e-3, abs=1e-7)


def test_the_loss_of_one_candidate_is_the_true_increase(
    net: nn.Module, graph: QuantGraph, images: Tensor
) -> None:
    found = score_layers(
        graph, images, LABELS, Scoring(bits=(2,), metric="loss", batch=9, rounding="nearest")
    )
    cross_entropy = torch.nn.functional.cross_entropy
    for name in LAYERS:
        changed = graph.copy()
        weight = changed.module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        spec, axis = weight_spec(2), 1 if name == "up" else 0
        scale = weight_scales(weight, spec, axis)
        with torch.no_grad():
            weight.copy_(fake_quantize(weight, scale, torch.zeros_like(scale), spec, axis))
            truth = cross_entropy(changed.module(images), LABELS) - cross_entropy(
                net(images), LABELS
            )
        assert found.score(name, "weight", 2) == pytest.approx(
            max(float(truth), 0.0), rel=1e-3, abs=1e-6
        )


def test_traces_are_those_of_a_quadratic_model() -> None:
    """A linear layer and the softmax: the Hessian is known; FIT's trace is of mean gradients."""
    head = nn.Linear(6, 4)
    with torch.no_grad():
        head.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(5)) / 4)
        head.bias.zero_()
    images = torch.randn(512, 6, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(512) % 4
    graph = to_float(head_only(head), images[:2])
    p = head(images).detach().softmax(1)
    squared = images.square().sum(1)
    trace = float(((p - p.square()).sum(1) * squared).mean())
    noise = perturb(graph, images, weight_bits=(3,), activation_bits=()).weights["head", 3]
    found = score_layers(graph, images, labels, Scoring(bits=(3,), metric="hawq"))
    expected = trace / 24 * float(noise.square().sum())
    assert found.score("head", "weight", 3) == pytest.approx(expected, rel=0.15)

    fit = score_layers(graph, images, labels, Scoring(bits=(3,), metric="fit", batch=16))
    y = torch.nn.functional.one_hot(labels, 4)
    grads = torch.stack(
        [
            (pp - yy).T @ x / 16
            for pp, yy, x in zip(p.split(16), y.split(16), images.split(16), strict=True)
        ]
    )
    step = (head.weight.detach().amax(1) - head.weight.detach().amin(1)) / 7
    expected = float((16 * grads.square().sum(2).mean(0) * step.square()).sum()) / 12
    assert fit.score("head", "weight", 3) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", ["fisher", "kl"])
def test_an_interrupted_scoring_goes_on(
    metric: str, graph: QuantGraph, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq.analyze.batches.SAVE_SECONDS", 0.0)
    partial = tmp_path / "cache" / "key.part.npz"
    how = Scoring(metric=metric, batch=6)  # type: ignore[arg-type]
    whole = score_layers(graph, images, how=how)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_layers(graph, images, how=how, partial=partial, progress=stop)
    assert len(list(partial.parent.iterdir())) == 1
    seen: list[int] = []
    again = score_layers(
        graph, images, how=how, partial=partial, progress=lambda done, total: seen.append(done)
    )
    assert again == whole
    assert seen[0] > seen[-1] // 3  # it did not begin anew
    assert not list(partial.parent.iterdir())


def test_labels_are_asked_for(graph: QuantGraph, images: Tensor) -> None:
    with pytest.raises(DataError, match="metric loss needs the label of every image"):
        score_layers(graph, images, how=Scoring(metric="loss"))
    with pytest.raises(DataError, match="Got 3 for 24 images"):
        score_layers(graph, images, LABELS[:3], Scoring(metric="fit"))


def test_layers_inside_an_untraceable_module_are_scored(images: Tensor) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Branching(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.inner(x).mean((2, 3)))
            return out

    graph = to_float(Whole().eval(), images[:2])
    for metric in ("fisher", "kl"):
        found = score_layers(graph, images, how=Scoring(act_bits=(8, 4), metric=metric))  # type: ignore[arg-type]
        assert found.score("inner.conv", "weight", 4) > 0
        assert found.score("inner.conv", "activation", 4) > 0


def test_weights_alone_can_be_scored_without_images(graph: QuantGraph) -> None:
    found = score_layers(graph, None, how=Scoring(metric="sqnr"))
    assert found.samples == 0
    row = next(r for r in found.rows if (r.layer, r.part, r.bits) == ("head", "weight", 4))
    assert row.sqnr is not None
    assert row.score == pytest.approx(10 ** (-row.sqnr / 10), rel=1e-5)


# -- errors ------------------------------------------------------------------------------------


def test_images_are_asked_for(graph: QuantGraph) -> None:
    with pytest.raises(DataError, match="metric fisher needs images"):
        score_layers(graph, None)


def test_an_unknown_metric_names_the_nearest(graph: QuantGraph, images: Tensor) -> None:
    with pytest.raises(UsageError, match="did you mean fisher"):
        score_layers(graph, images, how=Scoring(metric="fischer"))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [(), (8, 9)])
def test_widths_must_exist(bits: tuple[int, ...], graph: QuantGraph, images: Tensor) -> None:
    with pytest.raises(UsageError, match="weight widths must be some of 16 8 7 6"):
        score_layers(graph, images, how=Scoring(bits=bits))


@pytest.mark.parametrize("metric", ["fisher", "kl"])
@pytest.mark.parametrize("place", [0, 20])
def test_infinity_names_the_layer_where_it_begins(
    place: int, metric: str, graph: QuantGraph, images: Tensor
) -> None:
    images[place, 0, 0, 0] = 3e38
    with torch.no_grad():
        graph.module.get_submodule("stem").weight.mul_(100)  # type: ignore[operator]
    with pytest.raises(DataError, match="output or input of layer stem must be finite"):
        score_layers(graph, images, how=Scoring(metric=metric, batch=8))  # type: ignore[arg-type]


def test_weights_that_are_not_finite_name_the_layer(graph: QuantGraph, images: Tensor) -> None:
    with torch.no_grad():
        graph.module.get_submodule("side").weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(GraphError, match="weights of layer side must be finite"):
        score_layers(graph, images)


def test_metrics_of_labels_need_a_classifier(images: Tensor) -> None:
    graph = to_float(nn.Sequential(nn.Conv2d(3, 2, 1)).eval(), images[:2])
    for metric in ("loss", "fit", "hawq"):
        with pytest.raises(GraphError, match=r"answers with \[N, classes\].*outputs output: regr"):
            score_layers(graph, images, LABELS, Scoring(metric=metric))  # type: ignore[arg-type]


# -- the file ----------------------------------------------------------------------------------


def test_json_gives_back_what_was_written(graph: QuantGraph, images: Tensor) -> None:
    found = score_layers(graph, images, how=Scoring(bits=(16, 4)))
    text = json.dumps({**found.to_json(), "front": [], "chosen": {}}, allow_nan=False)
    assert Sensitivity.from_json(text) == found


@pytest.mark.parametrize("text", ["{", "{}", '{"format": "mpq/sensitivity", "version": 2}'])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match=r"s\.json must hold what `mpq analyze` writes"):
        Sensitivity.from_json(text, "s.json")


def test_a_width_that_was_not_scored_names_those_that_were(
    graph: QuantGraph, images: Tensor
) -> None:
    with pytest.raises(PolicyError, match=r"at 6 bits, but was scored at \[8, 4\] only"):
        score_layers(graph, images).score("stem", "weight", 6)


def test_the_key_follows_weights_images_and_settings(graph: QuantGraph, images: Tensor) -> None:
    base = Scoring().key(graph, images, None)
    assert Scoring().key(graph, images, None) == base == score_layers(graph, images).key
    assert Scoring().key(graph, images + 1, None) != base
    assert Scoring(bits=(8, 4, 2)).key(graph, images, None) != base
    assert Scoring(metric="kl").key(graph, images, None) != base
    labels = torch.zeros(len(images), dtype=torch.int64)
    assert Scoring().key(graph, images, labels) == base  # fisher does not look at them
    assert Scoring(rounding="feedback").key(graph, images, None) != base
    fit = Scoring(metric="fit").key(graph, images, labels)
    assert Scoring(metric="fit").key(graph, images, labels + 1) != fit
    with torch.no_grad():
        graph.module.get_submodule("head").weight.add_(1)  # type: ignore[operator]
    assert Scoring().key(graph, images, None) != base


# -- a real network ----------------------------------------------------------------------------


@pytest.mark.skipif("MPQ_DATA" not in os.environ, reason="MPQ_DATA does not name real data")
def test_scores_rank_configurations_of_a_real_network() -> None:
    root = Path(os.environ["MPQ_DATA"])
    module = load_model(root / "checkpoints" / "resnet20-cifar10.pth").module
    data, normalize = open_data("cifar10", root=root), Normalization.parse("imagenet")
    train = data.train.read(sample_indices(data.train, 128, 0))
    images = torch.from_numpy(normalize.apply(train))
    graph = to_float(module, images[:2])
    found = score_layers(graph, images)
    tests = torch.from_numpy(normalize.apply(data.test.read(np.arange(200))))
    candidates = perturb(graph, images, weight_bits=(8, 4), activation_bits=())
    weights = {n: candidates.weight(n).clone() for n in graph.layers}
    predicted, truth = [], []
    rng = np.random.default_rng(0)
    with torch.no_grad():
        reference = candidates.graph.module(tests).log_softmax(1)
        for share in np.linspace(0.05, 0.95, 14):
            bits = {n: 4 if rng.random() < share else 8 for n in weights}
            for name, weight in weights.items():
                candidates.weight(name).copy_(weight + candidates.weights[name, bits[name]])
            noisy = candidates.graph.module(tests).log_softmax(1)
            truth.append(float((reference.exp() * (reference - noisy)).sum(1).mean()))
            predicted.append(sum(found.score(n, "weight", b) for n, b in bits.items()))
    assert spearmanr(predicted, truth)[0] > 0.85
