"""What the documentation says that nothing else would notice: messages, commands, recordings."""

from __future__ import annotations

import ast
import functools
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from mpq.cli import COMMANDS
from mpq.keys import schema

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TROUBLE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^`(.+)`\n:   ", TROUBLE, re.MULTILINE)


@functools.cache
def texts() -> tuple[str, ...]:
    """Every text of the package, what is filled in as `…`."""
    found = []
    for path in [*(ROOT / "mpq").rglob("*.py"), *(ROOT / "export").rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        found += [_text(n) for n in nodes if isinstance(n, ast.expr) and id(n) not in docstrings]
    return tuple(text for text in found if text.strip("…"))


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


@pytest.mark.parametrize("message", QUOTED)
def test_every_message_that_is_explained_is_one_of_the_code(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in texts())


def test_the_messages_are_of_every_kind() -> None:
    assert len(QUOTED) == len(set(QUOTED)) > 45
    pattern = re.compile("no such message")
    assert not any(pattern.search(text) for text in texts())


def recording(name: str) -> list[str]:
    text = (DOCS / "recorded" / f"{name}.txt").read_text(encoding="utf-8")
    return re.findall(r"^\$ (.*)", text, re.MULTILINE)


def test_what_is_recorded_is_what_the_tour_says() -> None:
    page = (DOCS / "tour.md").read_text(encoding="utf-8")
    lines = [line for text in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
             for line in text.splitlines()]  # fmt: skip
    said = [re.sub(r"\s+#.*", "", line) for line in lines]
    assert [line for line in recording("tour") if line.startswith("mpq")] == said


def test_every_command_was_recorded_and_none_failed() -> None:
    names = {line.split()[1] for name in ("demo", "tour", "more") for line in recording(name)
             if line.startswith("mpq ")}  # fmt: skip
    assert names == set(COMMANDS)
    for path in (DOCS / "recorded").glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^(error:|Traceback|usage)", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(DOCS.glob("[pr]*/*.svg")), ids=lambda path: path.name)
def test_pictures_are_whole_and_need_nothing_else(path: Path) -> None:
    picture = ET.parse(path).getroot()
    assert picture.find("{http://www.w3.org/2000/svg}title") is not None
    links = re.findall(r'(?:href|src|url)[=(]"?([^"#)]+)', path.read_text(encoding="utf-8"))
    assert links == []


def test_the_picture_of_scores_is_that_of_the_kept_policy() -> None:
    drawn = runpy.run_path(str(DOCS / "pictures.py"))["scores"]()
    assert drawn == (DOCS / "pictures" / "scores.svg").read_text(encoding="utf-8")


def test_every_key_of_a_policy_is_explained() -> None:
    found = schema()
    for name, model in {"Policy": found, **found["$defs"]}.items():
        for key, value in model["properties"].items():
            assert value["description"].endswith("."), f"{name}.{key}"
