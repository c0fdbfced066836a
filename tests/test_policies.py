from __future__ import annotations

import pytest

from mpq import policies
from mpq.errors import PolicyError
from mpq.graph.passes import to_float
from mpq.pipeline.subject import DataSource, policy_subject
from mpq.wide import take_form


def test_every_ready_made_policy_loads() -> None:
    assert set(policies.names()) >= {"w8a8", "w4a8", "w16a16", "w16a16-exact"}
    for name in policies.names():
        assert policies.load(name).version == 1


@pytest.mark.parametrize(("name", "widths"), [("w8a8", (8, 8)), ("w4a8", (4, 8))])
def test_uniform_policy_fits_any_network(name: str, widths: tuple[int, int]) -> None:
    choice = policies.load(name).resolve(["a", "b.c"])["b.c"]
    assert (choice.weight_bits, choice.activation_bits) == widths


def test_both_forms_of_16_bits_are_there() -> None:
    fast, exact = policies.load("w16a16"), policies.load("w16a16-exact")
    assert fast != exact
    assert take_form(fast, "exact") == exact


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(PolicyError, match=r"must be one of .*did you mean w4a8"):
        policies.load("w4a")


def test_resnet20_policy_is_for_the_checkpoint(mpq_data) -> None:  # type: ignore[no-untyped-def]
    policy = policies.load("resnet20-cifar10-4.8bit")
    folder = mpq_data / "checkpoints"
    subject = policy_subject(policy, folder / "policy.yaml", DataSource("none"), weights=True)
    layers = to_float(subject.module, subject.graph().example).layers
    choices = policy.resolve(list(layers))
    bits = sum(layers[n].params * (c.weight_bits or 32) for n, c in choices.items())
    assert bits / sum(info.params for info in layers.values()) <= 4.8
