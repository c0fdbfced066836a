from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq import zoo
from mpq.checkpoint import load_safe, save_atomic, save_model
from mpq.data import Normalization
from mpq.errors import CheckpointError
from mpq.pipeline.guard import check_teacher
from mpq.policy import ModelInfo
from mpq.train.ensemble import Ensemble, Member, load_ensemble, measure, save_ensemble
from mpq.train.losses import kd_loss, standardize
from mpq.train.objective import choose_weighting
from mpq.train.recipe import Recipe
from mpq.train.weighting import (
    WEIGHTINGS,
    combine_logits,
    complete,
    dynamic,
    gradient,
)

K, B, C = 3, 40, 5
NONE = Normalization.parse("none")


def teachers(scale: float = 2.0, k: int = K) -> torch.Tensor:
    return scale * torch.randn(k, B, C, generator=torch.Generator().manual_seed(1))


def student(scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(B, C, generator=torch.Generator().manual_seed(2))


LABELS = torch.arange(B) % C


# Weightings


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("labels", [LABELS, F.one_hot(LABELS, C).float(), None])
def test_weights_are_a_distribution_over_members(name, labels):
    for scale, dtype in itertools.product((0.0, 1.0, 1e4), (torch.float32, torch.bfloat16)):
        w = WEIGHTINGS[name](teachers(scale).to(dtype), student(scale).to(dtype), labels, 0.3)
        assert w.shape == (K, B)
        assert w.dtype == torch.float32
        assert w.min() >= 0, (scale, dtype)
        torch.testing.assert_close(w.sum(0), torch.ones(B), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_one_member_gets_all_the_weight(name):
    w = WEIGHTINGS[name](teachers(k=1), student(), LABELS, 0.5)
    torch.testing.assert_close(w, torch.ones(1, B))


def test_vote_drops_the_minority():
    z = torch.tensor([[[5.0, 0, 0]], [[4.0, 0, 0]], [[0, 9.0, 0]]])
    w = WEIGHTINGS["vote"](z, torch.zeros(1, 3), None, 0.0)
    assert w.flatten().tolist() == [0.5, 0.5, 0.0]


def test_vote_breaks_a_tie_by_summed_probability():
    z = torch.tensor([[[0.1, 0.0, 0.0]], [[0.0, 9.0, 0.0]]])
    w = WEIGHTINGS["vote"](z, torch.zeros(1, 3), None, 0.0)
    assert w.flatten().tolist() == [0.0, 1.0]


def test_entropy_is_the_formula():
    p = teachers().softmax(2).double().numpy()
    h = -(p * np.log(p)).sum(2)
    expected = (1 - h / h.sum(0)) / (K - 1)
    w = WEIGHTINGS["entropy"](teachers(), student(), None, 0.0)
    np.testing.assert_allclose(w.numpy(), expected, atol=1e-5)


def test_confidence_is_the_formula():
    ce = torch.stack([F.cross_entropy(z, LABELS, reduction="none") for z in teachers()])
    expected = (1 - ce.softmax(0)) / (K - 1)
    w = WEIGHTINGS["confidence"](teachers(), student(), LABELS, 0.0)
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_finds_the_smallest_combined_gradient(temperature):
    w = gradient(teachers(), student(), LABELS, 0.0, temperature=temperature)
    g = (student() / temperature).softmax(1) - (teachers() / temperature).softmax(2)  # [K, B, C]

    def norm(a: torch.Tensor) -> torch.Tensor:
        return (a.unsqueeze(2) * g).sum(0).square().sum(1)

    axis = np.linspace(0, 0.6, 61)
    grid = [(a, b, 1 - a - b) for a, b in itertools.product(axis, axis) if 0.4 <= a + b <= 1]
    best = torch.stack([norm(torch.tensor(a).float().view(K, 1).expand(K, B)) for a in grid])
    assert w.max() <= 0.6 + 1e-5
    assert (norm(w) <= best.amin(0) * 1.02 + 1e-4).all()


def test_dynamic_prefers_who_is_right_and_early_on_who_is_near():
    label = torch.tensor([0])
    right, wrong = [4.0, 0.0, 0.0], [0.0, 4.0, 0.0]
    z = torch.tensor([[right], [wrong]])
    near_wrong = torch.tensor([wrong])
    late = dynamic(z, near_wrong, label, 1.0)
    early = dynamic(z, near_wrong, label, 0.0)
    early_near_right = dynamic(z, torch.tensor([right]), label, 0.0)
    assert late[0] > 0.95
    assert early[0] < late[0] < early_near_right[0] + 0.05
    assert early_near_right[0] > early[0]


def test_dynamic_is_the_formula():
    z, s, beta, tau, progress = teachers(), student(), 0.7, 2.0, 0.25
    ce = torch.stack([F.cross_entropy(t, LABELS, reduction="none") for t in z])
    log_s, p = standardize(s).log_softmax(1), standardize(z).softmax(2)
    kl = torch.stack([F.kl_div(log_s, t, reduction="none").sum(1) for t in p])
    expected = (-(ce + beta * (1 - progress) * kl) / tau).softmax(0)
    got = dynamic(z, s, LABELS, progress, beta=beta, tau=tau)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_dynamic_tells_members_apart_that_know_the_label_by_heart():
    """They differ in what they say of the other classes; one of them says it as the student."""
    label, s = torch.tensor([0]), torch.tensor([[1.0, 0.5, -1.0]])
    z = torch.tensor([[[20.0, 10.0, -20.0]], [[20.0, -20.0, 10.0]]])
    assert dynamic(z, s, label, 0.0)[0] > 0.55
    assert dynamic(z, s, label, 1.0)[0].item() == pytest.approx(0.5, abs=0.01)


def test_scales_of_logits_do_not_count_for_the_distance_of_dynamic():
    z, s = torch.stack([student() * 3, student()]), student() / 7
    w = dynamic(z, s, None, 0.0, tau=0.1, beta=100.0)
    alike = dynamic(z, s, None, 1.0, tau=0.1)  # only who is right
    torch.testing.assert_close(w, alike, atol=1e-3, rtol=0)


@pytest.mark.parametrize("temperature", [0.1, 100.0])
@pytest.mark.parametrize("standardized", [False, True])
def test_gradients_weights_are_a_mixture_at_any_temperature(temperature, standardized):
    how = {"temperature": temperature, "standardized": standardized}
    w = gradient(teachers(5e3).half(), student().half(), LABELS, 0.3, **how)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(0), torch.ones(B))


@pytest.mark.parametrize("distill", ["kd", "standardized"])
def test_a_recipe_weighs_by_the_gradients_of_its_loss(distill):
    recipe = Recipe(weighting="gradient", temperature=4.0, distill=distill)
    got = choose_weighting(recipe)(teachers(), student(), LABELS, 0.0)
    how = {"temperature": 4.0, "standardized": distill == "standardized"}
    expected = gradient(teachers(), student(), LABELS, 0.0, **how)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
    assert not torch.equal(got, gradient(teachers(), student(), LABELS, 0.0))


def test_dynamics_weights_are_a_mixture_of_any_logits():
    w = dynamic(teachers(5e3).half(), student().half(), LABELS, 0.3)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(0), torch.ones(B))


def test_a_recipe_sets_the_distance_and_the_softness_of_dynamic():
    recipe = Recipe(weighting="dynamic", weighting_beta=3.0, weighting_tau=0.5)
    got = choose_weighting(recipe)(teachers(), student(), LABELS, 0.0)
    expected = dynamic(teachers(), student(), LABELS, 0.0, beta=3.0, tau=0.5)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_large_tau_is_the_mean():
    w = dynamic(teachers(), student(), LABELS, 0.5, tau=1e6)
    torch.testing.assert_close(w, torch.full((K, B), 1 / K), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["confidence", "dynamic"])
def test_what_a_label_does_not_say_the_mean_prediction_does(name):
    soft = F.one_hot(LABELS, teachers().shape[2]).float()
    soft[1:] = 0
    whole = complete(soft, teachers())
    torch.testing.assert_close(whole.sum(1), torch.ones(B))
    got = WEIGHTINGS[name](teachers(), student(), whole, 0.3)
    labelled = WEIGHTINGS[name](teachers(), student(), LABELS, 0.3)
    unlabelled = WEIGHTINGS[name](teachers(), student(), None, 0.3)
    torch.testing.assert_close(got[:, :1], labelled[:, :1])
    torch.testing.assert_close(got[:, 1:], unlabelled[:, 1:])


# Combination


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_combined_logits_mix_probabilities(temperature):
    w = WEIGHTINGS["entropy"](teachers(), student(), None, 0.0)
    expected = (w.unsqueeze(2) * (teachers() / temperature).softmax(2)).sum(0)
    z = combine_logits(teachers(), w, temperature)
    torch.testing.assert_close((z / temperature).softmax(1), expected)


@pytest.mark.parametrize("temperature", [0.1, 100.0])
def test_combine_stays_finite_with_zero_weights_and_huge_logits(temperature):
    z = teachers(5e3).half()
    w = WEIGHTINGS["vote"](z, student(), None, 0.0)
    out = combine_logits(z, w, temperature)
    assert torch.isfinite(out).all()


def test_distilling_from_the_mixture_has_the_gradient_of_the_weighed_losses():
    w = WEIGHTINGS["confidence"](teachers(), student(), LABELS, 0.0)
    s = student().double().requires_grad_()
    kd_loss(s, combine_logits(teachers(), w, 2.0), temperature=2.0).backward()
    r = student().double().requires_grad_()
    for k in range(K):
        log_s, p = (r / 2).log_softmax(1), (teachers()[k].double() / 2).softmax(1)
        (4 * w[k] * F.kl_div(log_s, p, reduction="none").sum(1)).mean().backward()
    torch.testing.assert_close(s.grad, r.grad, atol=1e-6, rtol=1e-4)


# The module


class Probe(nn.Module):
    """Gives the mean of its input in the first logit; remembers the last input."""

    def __init__(self, classes: int = C) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, classes))
        self.norm = nn.BatchNorm2d(3)
        self.seen = torch.empty(0)

    def forward(self, x):
        self.seen = x
        return self.norm(x).mean((1, 2, 3)).unsqueeze(1) * self.weight


def test_each_member_gets_its_own_normalization_and_size():
    shifted = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    a, b = Probe(), Probe()
    ensemble = Ensemble([Member("a", a, NONE), Member("b", b, shifted, input=(3, 8, 8))])
    images = torch.rand(2, 3, 4, 4)
    assert ensemble(images).shape == (2, 2, C)
    torch.testing.assert_close(a.seen, images)
    assert b.seen.shape == (2, 3, 8, 8)
    corner = (images[:, :, 0, 0] - 0.5) / 0.25
    torch.testing.assert_close(b.seen[:, :, 0, 0], corner)


def test_teachers_are_frozen_and_stay_in_eval_mode():
    probe = Probe()
    ensemble = Ensemble([Member("a", probe, NONE)]).train()
    ensemble(torch.rand(4, 3, 4, 4))
    assert not probe.training
    assert not probe.norm.training
    assert probe.norm.running_mean.abs().sum() == 0
    assert not any(p.requires_grad for p in ensemble.parameters())


def test_members_must_know_the_same_classes():
    members = [Member("a", Probe(5), NONE, classes=5), Member("b", Probe(6), NONE, classes=6)]
    with pytest.raises(CheckpointError, match=r"same classes\. Got a: 5, b: 6"):
        Ensemble(members)
    with pytest.raises(CheckpointError, match=r"at least one member"):
        Ensemble([])


def test_measure_counts_each_member_and_the_mean():
    class Fixed(nn.Module):
        def __init__(self, z):
            super().__init__()
            self.z = z

        def forward(self, x):
            return self.z[: len(x)]

    labels = np.array([0, 1, 2, 0], np.int64)
    right = 3.0 * F.one_hot(torch.tensor([0, 1, 2, 0]), 3)
    half = 2.0 * F.one_hot(torch.tensor([0, 1, 0, 1]), 3)
    ensemble = Ensemble([Member("r", Fixed(right), NONE), Member("h", Fixed(half), NONE)])
    measured = measure(ensemble, np.zeros((4, 4, 4, 3), np.uint8), labels)
    assert [m.top1 for m in measured.members] == [100.0, 50.0]
    assert measured.top1 == 100.0


# The file


def two_members() -> Ensemble:
    torch.manual_seed(0)
    make = partial(zoo.build, "resnet20", 4)
    info = {"arch": "resnet20", "classes": 4, "input": (3, 16, 16)}
    cifar = Normalization.parse("cifar10")
    odd = Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    members = [Member("a", make(), cifar, 91.5, **info), Member("b", make(), odd, **info)]
    return Ensemble(members, top1=93.25)


def test_save_and_load_are_inverses(tmp_path):
    ensemble = two_members()
    save_ensemble(tmp_path / "ens.pth", ensemble, data="digits")
    again = load_ensemble(tmp_path / "ens.pth")
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(ensemble(images), again(images))
    assert again.top1 == 93.25
    for m, n in zip(ensemble.members, again.members, strict=True):
        assert replace(m, module=None) == replace(n, module=None)
    stored = torch.load(tmp_path / "ens.pth", weights_only=True)
    assert (stored["format"], stored["version"], stored["data"]) == ("mpq/ensemble", 1, "digits")
    assert [p.name for p in tmp_path.iterdir()] == ["ens.pth"]


def test_a_single_model_is_an_ensemble_of_one(tmp_path):
    model = zoo.build("resnet20", 4)
    info = ModelInfo(arch="resnet20", classes=4, input=(3, 16, 16), normalize="cifar10")
    save_model(tmp_path / "one.pth", model, info=info, metrics={"top1": 88.0})
    again = mock.patch("mpq.checkpoint.load_safe", side_effect=AssertionError("read twice"))
    with mock.patch("mpq.train.ensemble.load_safe", wraps=load_safe) as read, again:
        ensemble = load_ensemble(tmp_path / "one.pth")
    read.assert_called_once()
    member = ensemble.members[0]
    assert (ensemble.names, ensemble.top1, member.top1) == (["one"], 88.0, 88.0)
    assert str(member.normalize) == "cifar10"
    x = torch.rand(2, 3, 16, 16)
    mean = torch.tensor(member.normalize.mean).view(-1, 1, 1)
    std = torch.tensor(member.normalize.std).view(-1, 1, 1)
    torch.testing.assert_close(ensemble(x)[0], model((x - mean) / std))


def test_a_foreign_file_needs_its_normalization(tmp_path):
    torch.save(zoo.build("resnet20", 4).state_dict(), tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"does not say how its images are normalized"):
        load_ensemble(tmp_path / "foreign.pth")
    ensemble = load_ensemble(tmp_path / "foreign.pth", normalize="imagenet")
    assert str(ensemble.members[0].normalize) == "imagenet"


def test_saving_needs_the_architecture(tmp_path):
    ensemble = Ensemble([Member("a", Probe(), NONE)])
    with pytest.raises(CheckpointError, match=r"member a must have arch, classes and input"):
        save_ensemble(tmp_path / "ens.pth", ensemble)
    assert not list(tmp_path.iterdir())


def _break(content, how):
    member = content["members"][1]
    if how == "version":
        content["version"] = 9
    elif how == "empty":
        content["members"] = []
    elif how == "key":
        del member["state"]
    elif how == "arch":
        member["arch"] = "resnet9000"
    elif how == "nan":
        member["state"][next(iter(member["state"]))].fill_(float("nan"))
    elif how == "type":
        content["members"][1] = 5
    else:
        member["state"].pop(next(iter(member["state"])))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("version", r"version must be 1\. Got 9"),
        ("empty", r"at least one entry"),
        ("key", r"member 1 cannot be rebuilt: 'state' is missing"),
        ("arch", r"member 1 cannot be rebuilt: .*resnet9000"),
        ("state", r"member 1 cannot be rebuilt: .*[Mm]issing key"),
        ("nan", r"member 1 cannot be rebuilt: .* is not finite"),
        ("type", r"member 1 cannot be rebuilt"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, how, message):
    path = tmp_path / "ens.pth"
    save_ensemble(path, two_members())
    content = torch.load(path, weights_only=True)
    _break(content, how)
    save_atomic(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_ensemble(path)


def test_a_teacher_of_other_channels_is_refused():
    member = Member("gray", nn.Identity(), Normalization((0.5,), (0.5,)), input=(1, 8, 8))
    info = ModelInfo(arch="colour", classes=10, input=(3, 8, 8), normalize="none")
    with pytest.raises(CheckpointError, match=r"gray must take images of 3 channels.*Got 1"):
        check_teacher(Ensemble([member]), info)
