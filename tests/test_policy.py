from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import mpq
import mpq.export
from mpq.errors import PolicyError
from mpq.policy import (
    Constraints,
    DataInfo,
    DefaultSpec,
    LayerPolicy,
    ModelInfo,
    Policy,
    SearchResult,
)
from mpq.spec import QuantSpec

NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv2", "fc"]
W4, W8 = QuantSpec.parse("int4/channel"), QuantSpec.parse("int8/channel")
A4, A8 = QuantSpec.parse("uint4/tensor"), QuantSpec.parse("uint8/tensor")


def full() -> Policy:
    return Policy(
        model=ModelInfo(arch="resnet20", checkpoint="a: b.pth", sha256="5f0c", classes=10),
        data=DataInfo(name="cifar10", samples=64, seed=3),
        default=DefaultSpec(weight=W8, activation=A8),
        groups=[["layer1.0.conv2", "layer1.1.conv2"]],
        layers=[
            LayerPolicy(name="layer1.*", weight=W4, locked=True),
            LayerPolicy(name="fc", weight="float", activation="float", reason="small, 0.2 %: no"),
            LayerPolicy(name="layer1.1.conv2", locked=False),
        ],
        constraints=Constraints(effective_bits=4.8),
        result=SearchResult(effective_bits=4.7, weight_bytes=1, predicted_bytes=2, bitops=1.6e9),
        evidence={"conv1": {"score": {"8": 1.2e-4}}},
    )


def test_yaml_round_trip():
    policy = full()
    again = Policy.from_yaml(policy.to_yaml())
    assert again == policy
    assert again.to_yaml() == policy.to_yaml()


def test_yaml_has_one_line_per_layer():
    lines = full().to_yaml().splitlines()
    assert "  - {name: layer1.*, weight: int4/channel, locked: true}" in lines
    assert "default: {weight: int8/channel, activation: uint8/tensor}" in lines
    assert "  - [layer1.0.conv2, layer1.1.conv2]" in lines
    assert lines[0] == "version: 1"


def test_yaml_leaves_out_what_is_empty():
    data = yaml.safe_load(Policy().to_yaml())
    assert set(data) == {"version", "data", "target", "default", "layers"}


@pytest.mark.parametrize(
    "value",
    [
        Policy(),
        Constraints(),
        LayerPolicy(name="a"),
        DefaultSpec(),
        DataInfo(),
        ModelInfo(arch="a", classes=2),
        SearchResult(effective_bits=8, weight_bytes=1, predicted_bytes=1, bitops=1),
    ],
)
def test_what_a_policy_holds_is_never_changed(value: BaseModel):
    name = next(iter(type(value).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, name, getattr(value, name))


def test_what_is_replaced_is_validated():
    with pytest.raises(PolicyError, match=r"effective_bits: .*greater than 0.* Got -3"):
        Constraints().replace(effective_bits=-3)
    with pytest.raises(PolicyError, match="effective_bit is not a known key; did you mean"):
        Constraints().replace(effective_bit=3)
    with pytest.raises(PolicyError, match=r"layers\.0\.weight: a number format must look like"):
        Policy().replace(layers=[{"name": "a", "weight": "8 bits"}])
    with pytest.raises(PolicyError, match=r"max_drop: .*greater than or equal to 0"):
        Constraints(effective_bits=4).with_limit("max_drop", -1)
    assert DataInfo(seed=3).replace(samples=7) == DataInfo(seed=3, samples=7)


def test_further_layers_win():
    policy = Policy(layers=[LayerPolicy(name="a", weight="int4/channel")])
    policy = policy.with_layers(LayerPolicy(name="a", weight="int2/channel"))
    assert policy.resolve(["a"])["a"].weight_bits == 2


def test_constraints_without_one_keep_the_others():
    given = Constraints(effective_bits=4, max_bops=1, max_drop=2, drop_type="relative")
    assert given.without("max_bops") == Constraints(effective_bits=4)


def test_nothing_is_copied_unvalidated():
    """`model_copy(update=...)` of pydantic validates nothing; `replace` does."""
    roots = (Path(mpq.__file__).parent, Path(mpq.export.__file__).parent)
    for path in (p for root in roots for p in root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\.model_(copy|construct)\(", text), f"{path}: use replace(...)"


def test_load(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(full().to_yaml(), encoding="utf-8")
    assert Policy.load(path) == full()


def test_load_missing(tmp_path):
    with pytest.raises(PolicyError, match=r"p.yaml does not exist. `mpq analyze MODEL` writes one"):
        Policy.load(tmp_path / "p.yaml")


def test_load_unreadable(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read"):
        Policy.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match=r"binary.yaml cannot be read: it is no text file\. `mpq"):
        Policy.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: [", "p.yaml is not valid YAML: line 1, column 11: expected the node content"),
        ("- 1", "must be a YAML mapping that begins with `version: 1`. Got list"),
        ("", "Got NoneType"),
        ("default: {}", "version must be 1. Got None"),
        ("version: 2", "version must be 1. Got 2"),
        ("version: 1\nlayer: []", "layer is not a known key; did you mean layers"),
        (
            "version: 1\nlayers: [{name: a, wieght: float}]",
            "layers.0.wieght is not a known key; did you mean weight",
        ),
        ("version: 1\ndefault: {weight: 4}", "default.weight: a number format .* Got '4'"),
        ("version: 1\ndefault: {weight: int9/channel}", "default.weight: bits must be one of"),
        ("version: 1\nmodel: {arch: resnet20}", "model.classes is missing"),
        ("version: 1\nmodel: {arch: a, classes: 0}", "greater than or equal to 1. Got 0"),
        ("version: 1\nconstraints: {effective_bits: -1}", "greater than 0. Got -1"),
    ],
)
def test_bad_files_say_what_is_wrong(text: str, message: str):
    with pytest.raises(PolicyError, match=message):
        Policy.from_yaml(text, "p.yaml")


def test_defaults_then_the_last_match_field_by_field():
    policy = Policy(
        target="onnxruntime-cpu",
        default=DefaultSpec(weight=W8, activation=A8),
        layers=[
            LayerPolicy(name="layer1.*", weight=W4, reason="wide", locked=True),
            LayerPolicy(name="layer1.0.*", activation=A4),
            LayerPolicy(name="layer1.0.conv2", weight="float", locked=False),
        ],
    )
    found = policy.resolve(NAMES)
    assert list(found) == NAMES
    widths = {n: (c.weight_bits, c.activation_bits, c.locked, c.reason) for n, c in found.items()}
    assert widths == {
        "conv1": (8, 8, False, ""),
        "layer1.0.conv1": (4, 4, True, "wide"),
        "layer1.0.conv2": (None, 4, False, "wide"),
        "layer1.1.conv2": (4, 8, True, "wide"),
        "fc": (8, 8, False, ""),
    }
    assert {
        c.name: (c.weight_bits, c.activation_bits)
        for c in policy.resolve(NAMES).values()
        if c.locked
    } == {"layer1.0.conv1": (4, 4), "layer1.1.conv2": (4, 8)}


def test_an_exact_name_is_not_read_as_a_glob():
    policy = Policy(layers=[LayerPolicy(name="block[0]", weight=W4)])
    found = policy.resolve(["block[0]", "block0"])
    assert [c.weight_bits for c in found.values()] == [4, 8]


@pytest.mark.parametrize("pattern", ["layer1.0.conv3", "layer9.*"])
def test_a_pattern_must_match(pattern: str):
    message = f"layers: '{re.escape(pattern)}' must name a layer .* none of its 5 layers"
    with pytest.raises(PolicyError, match=message):
        Policy(layers=[LayerPolicy(name=pattern)]).resolve(NAMES)


def test_an_unknown_layer_is_answered_with_the_nearest():
    with pytest.raises(PolicyError, match=r"did you mean layer1\.0\.conv[12]"):
        Policy(layers=[LayerPolicy(name="layer1.0.conv3")]).resolve(NAMES)


def test_groups_must_agree():
    groups = [["layer1.*.conv2"]]
    Policy(groups=groups).resolve(NAMES)
    layers = [LayerPolicy(name="layer1.1.conv2", activation=A4)]
    with pytest.raises(
        PolicyError, match=r"must agree. Got layer1.0.conv2: uint8/tensor, layer1.1"
    ):
        Policy(groups=groups, layers=layers).resolve(NAMES)
    with pytest.raises(PolicyError, match="groups: 'conv7' must name a layer"):
        Policy(groups=[["conv7"]]).resolve(NAMES)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": "uint8/channel"}, "weight of layer fc must be signed, e.g. int8/channel"),
        ({"activation": "uint8/channel"}, "activation of layer fc must be uint8/tensor at 8 bits"),
        (
            {"activation": "int8/tensor"},
            "must be uint8/tensor at 8 bits, or uint8/dynamic. Got int8/tensor",
        ),
        ({"activation": "int16/channel"}, "at 16 bits, or uint16/tensor. Got int16/channel"),
    ],
)
def test_formats_that_no_kernel_reads(entry: dict[str, str], message: str):
    policy = Policy.model_validate({"layers": [{"name": "fc", **entry}]})
    with pytest.raises(PolicyError, match=message):
        policy.resolve(NAMES)


def test_unknown_target():
    with pytest.raises(
        PolicyError, match=r"target must be one of onnxruntime-cpu, .* between. Got 'tpu'"
    ):
        Policy(target="tpu").resolve(NAMES)


@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (4, 8), (2, 8), (16, 16)])
def test_uniform(weight: int, activation: int):
    choice = Policy.uniform(weight).resolve(["a"])["a"]
    assert (choice.weight_bits, choice.activation_bits) == (weight, activation)
    assert Policy.uniform(weight, 4).resolve(["a"])["a"].activation == A4
