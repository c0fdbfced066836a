"""Every example runs in an empty folder, learns, and leaves a file that runs as integers."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import mpq
from mpq._torchvision import declare_missing

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {"with_lightning": "lightning"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "digits")


@pytest.mark.parametrize("name", NAMES)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDS:
        declare_missing()  # lightning imports torchvision, which a torch without CUDA may not suit
        pytest.importorskip(NEEDS[name], reason=f"{name} needs {NEEDS[name]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (trained,) = re.findall(r"trained (\d+\.\d+) %", capsys.readouterr().out)
    assert float(trained) > 75
    assert mpq.certify("model.onnx").integer_macs_fraction == 1
