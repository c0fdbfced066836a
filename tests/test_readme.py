"""README, docs and CONTRIBUTING: blocks are run, names and files compared; and the size script.

`make test-docs` runs every `sh` and `python` block of PAGES, which are all pages that have one, as
it stands, in order, in an empty folder. Here the commands are parsed, which finds options and names
that are gone: those too that need what a reader may not have (`bash` blocks, blocks of no language
and indented ones); and the Python block of README is run.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from mpq.cli import load_command
from mpq.policy import Policy
from mpq.userimport import trusting

ROOT = Path(__file__).resolve().parent.parent
RUNNER = runpy.run_path(str(ROOT / "benchmarks" / "blocks.py"))
PAGES = {"README.md": 6, "docs/tour.md": 6, "docs/yours.md": 4, "docs/analysis.md": 1,
         "docs/training.md": 1}  # fmt: skip
"""Pages whose blocks run, and how many these are."""
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = 1300


def blocks(page: str) -> list[Any]:
    found: list[Any] = RUNNER["blocks"](ROOT / page)
    return found


DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = re.compile(r"^```(?:sh|bash)?\n(.*?)^```|^((?:    .*\n)+)", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The commands that a page shows, whether they run here or not."""
    shown = SHOWN.findall((ROOT / page).read_text(encoding="utf-8"))
    lines = "".join(a + b for a, b in shown).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    """A command without what is said of it behind two spaces; nothing of other lines."""
    line = re.sub(r"\s{2,}[^-\s].*", "", line.strip().partition(" # ")[0])
    begins = ("mpq ", "python ", "torchrun ", "accelerate ", "MPQ_DATA=")
    return shlex.split(line) if line.startswith(begins) else []


@pytest.mark.parametrize("page", [page for page in ("README.md", *DOCS) if commands(page)])
def test_every_command_is_one_with_these_options(page: str) -> None:
    for words in commands(page):
        script = next((word for word in words if word.endswith(".py")), "")
        assert not script or (ROOT / script).is_file(), words
        if "mpq" in words and "..." not in words:
            name, *rest = words[words.index("mpq") + 1 :]
            rest = [re.sub(r"^my\.\S+", "builtins:len", word) for word in rest]  # the reader's own
            with trusting(), click.Context(click.Group("mpq")) as parent:
                load_command(name).make_context(name, rest, parent=parent)


def test_every_page_with_blocks_runs() -> None:
    assert {page for page in ("README.md", *DOCS) if any(b.runs for b in blocks(page))} == {*PAGES}


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_every_policy_can_be_read(page: str) -> None:
    found = [block.text for block in blocks(page) if block.language == "yaml"]
    assert found
    for text in found:
        assert Policy.from_yaml(text).layers


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = [block.text for block in blocks("README.md") if block.language == "python"]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "100.0% of the MACs run as integers" in said
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.skipif("MPQ_DOCS" not in os.environ, reason="minutes: make test-docs runs it")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    run = 0
    with RUNNER["quick"]() as env:
        for number, block in enumerate(blocks(page)):
            done = RUNNER["run"](block, tmp_path, env)
            assert done.returncode == 0, f"{page}, block {number}:\n{block.text}\n{done.stderr}"
            run += block.runs
    assert run == PAGES[page]


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= WORDS


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    inside = [link for link in links if not link.startswith("http")]
    assert [link for link in inside if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_picture_is_that_of_the_kept_results(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "front.py"))
    measured = {row["row"]: row for row in benchmark["rows"]()}
    assert measured.keys() == benchmark["SHOWN"].keys()
    for row in measured.values():
        top1, images = float(row["test_top1"]), int(row["test_images"])
        low, high = benchmark["interval"](top1, images)
        assert low < top1 < high
    picture = (ROOT / "docs" / "front.svg").read_text(encoding="utf-8")
    for row in measured.values():  # matplotlib keeps the texts that it drew as comments
        assert f"{benchmark['SHOWN'][row['row']][0]}, {int(row['bytes']) / 1e3:,.0f} kB" in picture


def test_every_folder_of_the_repository_has_its_line() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    layout = text.partition("\n## Layout\n")[2].partition("\n## ")[0]
    packages = {path.parent for top in ("mpq", "export", "policies")
                for path in (ROOT / top).rglob("__init__.py")}  # fmt: skip
    folders = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    named = re.findall(r"^- `(\S+)`", layout, re.MULTILINE)
    assert sorted(named) == sorted(folders | {"benchmarks/", "examples/", "tests/", "docs/"})


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in (*PAGES, "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"^make (\w[\w-]+)|`make (\w[\w-]+)`", text, re.MULTILINE):
            assert f"\n{''.join(target)}:" in makefile


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
