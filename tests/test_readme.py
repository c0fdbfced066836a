"""The README is run and compared: its code, its layout, its commands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from mpq.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_library_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(code.group(1), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert (tmp_path / "model.onnx").stat().st_size < 200_000
    assert "100% integer" in said


def test_layout_has_every_file() -> None:
    spec = importlib.util.spec_from_file_location("layout", ROOT / "docs" / "layout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    told = README.partition(module.BEGIN)[2].partition(module.END)[0]
    assert told == module.layout(), "run: python docs/layout.py --write"


def test_commands_of_the_readme_exist() -> None:
    named = set(
        re.findall(r"^mpq (\w+) ", "".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)), re.M)
    )
    assert named
    assert named <= set(COMMANDS)


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
