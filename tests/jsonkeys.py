"""The keys of what `--json` prints, and those that docs/json.md has of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

JSON = Path(__file__).parents[1] / "docs" / "json.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.M)


def documented() -> dict[str, set[str]]:
    """The keys of each command, as the page has them; it explains each of them."""
    commands, _, meanings = JSON.read_text().partition("| key |")
    found = {name: set(re.findall(r"`([^`]+)`", text)) for name, text in ROW.findall(commands)}
    assert {key for row in found.values() for key in row} == {k for k, _ in ROW.findall(meanings)}
    return found


def keys(content: Mapping[str, object]) -> set[str]:
    """The keys of an object, and of the objects in its lists."""
    inner = (row for value in content.values() if isinstance(value, list) for row in value)
    return content.keys() | {key for row in inner if isinstance(row, dict) for key in row}
