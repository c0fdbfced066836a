from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpq.errors import PolicyError, UsageError
from mpq.latency import LatencyProfile, LayerLatency

PROFILE = LatencyProfile(
    cpu="Some CPU, avx512_vnni",
    runtime="onnxruntime 1.31.1",
    threads=1,
    batch=1,
    layers={
        "stem": LayerLatency(1.0, 2.0),
        "body": LayerLatency(10.0, 40.0),
        "fc": LayerLatency(0.5, 0.25),
    },
    boundary_ms={("stem", "body"): 0.125, ("body", "fc"): 0.0625},
    base_ms=0.03125,
)


def test_prediction_is_the_sum_of_base_layers_and_boundaries():
    def predict(stem: bool, body: bool, fc: bool) -> float:
        return PROFILE.predict({"stem": stem, "body": body, "fc": fc})

    assert predict(True, True, True) == 0.03125 + 1 + 10 + 0.5
    assert predict(False, False, False) == 0.03125 + 2 + 40 + 0.25
    assert predict(True, False, True) == 0.03125 + 1 + 40 + 0.5 + 0.125 + 0.0625
    assert predict(True, True, False) == 0.03125 + 1 + 10 + 0.25 + 0.0625


def test_json_gives_the_same_profile_back(tmp_path: Path):
    path = tmp_path / "run" / "profile.json"
    PROFILE.save(path)
    assert LatencyProfile.load(path) == PROFILE
    assert json.loads(path.read_text())["boundary_ms"][0] == ["stem", "body", 0.125]


def test_widths_of_another_network_are_refused():
    runs = {"stem": True, "body": True, "fc": True}
    with pytest.raises(PolicyError, match="profile lacks layer 'layer1'"):
        PROFILE.predict(runs | {"layer1": True})
    del runs["fc"]
    with pytest.raises(PolicyError, match="the network lacks layer 'fc'"):
        PROFILE.predict(runs)


def changed(**fields: object) -> str:
    return json.dumps(json.loads(PROFILE.to_json()) | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "p.json must be a profile that `mpq profile` wrote"),
        ("[]", "p.json must be a profile that `mpq profile` wrote"),
        ("{}", "p.json must be a profile .* KeyError: 'version'"),
        (changed(version=2), "p.json: version must be 1. Got 2 instead"),
        (changed(layers={"stem": {"integer_ms": 1}}), "p.json must be a profile .* 'float_ms'"),
        (changed(layers=3), "p.json must be a profile"),
        (changed(threads="many"), "p.json must be a profile"),
        (changed(base_ms=-1), "p.json: times of a latency profile must be finite .* Got -1.0"),
        (changed(base_ms=float("nan")), "must be finite milliseconds, 0 or more. Got nan"),
        (
            changed(boundary_ms=[["stem", "bodi", 1]]),
            "boundary stem -> bodi .* 'bodi' is none; did you mean body",
        ),
    ],
)
def test_a_text_that_is_no_profile_is_refused(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        LatencyProfile.from_json(text, "p.json")


def test_a_missing_or_unreadable_file_is_told(tmp_path: Path):
    with pytest.raises(UsageError, match=r"profile\.json does not exist\. `mpq profile MODEL`"):
        LatencyProfile.load(tmp_path / "profile.json")
    (tmp_path / "profile.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match=r"profile\.json cannot be read"):
        LatencyProfile.load(tmp_path / "profile.json")


def test_the_profile_is_free_of_torch():
    code = "import sys, mpq.latency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
