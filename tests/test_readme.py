"""README and CONTRIBUTING are run and compared: code, layout, commands, files; the size script."""

from __future__ import annotations

import re
import runpy
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


def test_every_folder_of_the_repository_has_its_line() -> None:
    layout = README.partition("\n## Layout\n")[2].partition("\n## ")[0]
    packages = {path.parent for top in ("mpq", "export", "policies")
                for path in (ROOT / top).rglob("__init__.py")}  # fmt: skip
    folders = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    named = re.findall(r"^- `(\S+)`", layout, re.MULTILINE)
    assert sorted(named) == sorted(folders | {"benchmarks/", "tests/", "docs/"})


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


def test_files_and_names_of_contributing_exist() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:mpq|export|tests|benchmarks|\.ci)/[\w/.]+)`", table)
    paths += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", table)]
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []
    named = re.findall(r"`(\w+/[\w/]+\.py)`: `(\w+)`", table)
    assert len(named) >= 4
    assert [n for path, n in named if n not in (ROOT / path).read_text(encoding="utf-8")] == []


def test_the_size_script_names_what_is_too_long(tmp_path: Path) -> None:
    size = runpy.run_path(str(ROOT / ".ci" / "size.py"))
    (tmp_path / "mpq").mkdir()
    (tmp_path / "mpq" / "long.py").write_text("x = 1\n" * (size["FILE_LINES"] + 1))
    sizes = size["lines"](tmp_path)
    assert sizes == {"mpq/long.py": size["FILE_LINES"] + 1}
    assert size["complaints"]({"mpq/short.py": size["FILE_LINES"]}) == []
    assert [c.split(" has ")[0] for c in size["complaints"](sizes)] == ["mpq/long.py"]
    many = {f"mpq/{i}.py": 300 for i in range(size["PACKAGE_LINES"] // 300 + 1)}
    assert [c.split(" has ")[0] for c in size["complaints"](many)] == ["the package"]
