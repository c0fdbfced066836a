from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpq.cli import main
from mpq.compare import compare
from mpq.errors import PolicyError
from mpq.policy import LayerPolicy, ModelInfo, Policy
from mpq.spec import activation_spec, weight_spec

EVIDENCE = {
    "conv": {
        "score": {"8": 0.1, "4": 0.5},
        "activation": {"8": 0.2, "4": 0.3},
        "params": 100,
        "macs": 1000,
        "reason": "large",
    },
    "fc": {"score": {"8": 0.0, "4": 0.25}, "activation": {"8": 0.1}, "params": 300, "macs": 300},
}


def policy(*layers: LayerPolicy, evidence: dict[str, object] | None = None) -> Policy:
    return Policy(
        model=ModelInfo(arch="net", classes=4),
        layers=list(layers),
        evidence=EVIDENCE if evidence is None else evidence,
    )


FOUR = LayerPolicy(name="conv", weight=weight_spec(4), activation=activation_spec(4))


def test_amounts_of_a_change() -> None:
    found = compare(policy(), policy(FOUR))
    (change,) = found.changes
    assert (change.layer, change.a, change.b) == ("conv", (8, 8), (4, 4))
    assert change.bytes == found.bytes == 50 - 100
    assert change.bitops == 1000 * (16 - 64)
    assert change.drop == pytest.approx(0.5 + 0.3 - 0.1 - 0.2)
    assert change.reason == "large"
    assert (found.effective_bits_a, found.effective_bits_b) == (8.0, (100 * 4 + 300 * 8) / 400)
    assert found.layers == 2


def test_what_is_not_known_is_not_told() -> None:
    bare = compare(policy(evidence={}), policy(FOUR, evidence={}))
    assert bare.changes[0].bytes is None
    assert bare.effective_bits_a is None
    odd = LayerPolicy(name="fc", activation=activation_spec(4))  # never scored
    found = compare(policy(), policy(odd))
    assert found.changes[0].drop is None
    assert found.drop is None
    assert found.bytes == 0


def test_defaults_are_compared_where_no_layer_is_named() -> None:
    found = compare(Policy.uniform(8), Policy.uniform(4))
    assert [(c.a, c.b) for c in found.changes] == [((8, 8), (4, 8))]


def test_other_networks_are_refused() -> None:
    other = Policy(model=ModelInfo(arch="gate", classes=4))
    with pytest.raises(PolicyError, match=r"must be of one network.*net and gate"):
        compare(policy(), other)
    with pytest.raises(PolicyError, match="only one of them knows fc"):
        compare(policy(), policy(evidence={"conv": EVIDENCE["conv"]}))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(policy().to_yaml())
    b.write_text(policy(FOUR).to_yaml())
    assert main(["diff", str(a), str(b)]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # a long path breaks the line anywhere
    assert "conv" in shown
    assert "1 of 2 layers differ" in shown
    assert main(["diff", str(a), str(b), "--json", "--exit-code"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == -50
    assert told["changes"][0]["b"] == [4, 4]
    assert main(["diff", str(a), str(a), "--exit-code"]) == 0
    assert "the same widths" in capsys.readouterr().out
    assert main(["diff", str(a), str(tmp_path / "none.yaml")]) == 2
    assert "does not exist" in capsys.readouterr().err
