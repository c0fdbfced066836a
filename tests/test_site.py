"""What the documentation says that nothing else would notice: messages, commands, recordings."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

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
