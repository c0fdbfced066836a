"""Print the README's layout: one line per file, from the first line of its docstring.

python docs/layout.py            what README.md's "Layout" section must hold (a test compares)
python docs/layout.py --write    put it there
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- layout -->\n", "<!-- /layout -->\n"
FOLDERS = ("mpq", "export", "policies", "benchmarks")


def layout() -> str:
    """The section's text."""
    lines = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if told:
                name = path.relative_to(ROOT).as_posix()
                lines.append(f"- `{name}` {told.splitlines()[0]}\n")
    return "".join(lines)


def main() -> None:
    """Print or write."""
    if "--write" not in sys.argv[1:]:
        print(layout(), end="")
        return
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + layout() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
