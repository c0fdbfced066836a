"""What the commands print, recorded for README and docs: nothing there is typed by hand.

    python benchmarks/record.py             all of it: about five minutes of one core
    python benchmarks/record.py demo        one session of SESSIONS

Each session runs in an empty folder, its standard output on a terminal of 80 columns, its standard
error in a pipe, which leaves out the progress bars. `docs/recorded/NAME.txt` has each command and
what it printed; sessions in PICTURES are drawn as SVG (rich) as well. The home folder is written
`~`, and nothing else is changed.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
from collections.abc import Iterator
from html import escape
from pathlib import Path

import blocks
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORDED = DOCS / "recorded"
COLUMNS = 80
MORE = """\
mpq train resnet8 --data digits --epochs 3 --set batch=16 --set flip=false -o model.pth
mpq analyze model.pth
mpq ptq
mpq export
mpq portability
mpq targets
mpq schema | head -n 24
mpq completion bash | head -n 4
mpq cache
"""
PICTURES = {"demo": "mpq demo", "tour": "mpq: from a checkpoint to a proven file"}
SHORT = ("mpq analyze model.pth --validate", "mpq ptq", "mpq export", "mpq bench", "mpq diagnose",
         "mpq ensemble", "mpq qat")  # fmt: skip
"""Beginnings of the tour's commands that its picture has, so that it fits a page."""
THEME = TerminalTheme(
    (22, 27, 34),
    (201, 209, 217),
    [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255),
     (188, 140, 255), (57, 197, 207), (177, 186, 196)],
)  # fmt: skip
FORMAT = """\
<svg class="terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>TITLE</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", "Liberation Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def sessions() -> dict[str, list[blocks.Block]]:
    """What is run, by the name of its recording."""
    tour = [block for block in blocks.blocks(DOCS / "tour.md") if block.runs or block.title]
    return {
        "demo": [blocks.Block("sh", "", "mpq demo")],
        "tour": tour,
        "more": [blocks.Block("sh", "", MORE)],
    }


def commands(session: list[blocks.Block]) -> Iterator[tuple[str, blocks.Block]]:
    """Each line of a shell block by itself, with what stands behind the prompt."""
    for block in session:
        if block.language == "sh":
            for line in filter(str.strip, block.text.splitlines()):
                yield re.sub(r"\s+#.*", "", line), block._replace(text=line)
        else:
            yield "python tour.py" if block.runs else "", block


def record(session: list[blocks.Block]) -> list[tuple[str, str]]:
    """Run a session in an empty folder: each command, and what the terminal then shows."""
    found = []
    with tempfile.TemporaryDirectory() as home, blocks.quick() as quick:
        folder = Path(home) / "work"
        folder.mkdir()
        env = {**quick, "HOME": home, "XDG_CACHE_HOME": f"{home}/.cache"}
        for prompt, block in commands(session):
            code, said = _on_terminal(block, folder, env)
            if code:
                sys.exit(f"{prompt}: exit code {code}\n{said}")
            if prompt:
                print(f"$ {prompt}\n{said}", flush=True)
                found.append((prompt, said.replace(home, "~")))
    return found


def _on_terminal(block: blocks.Block, folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run a block, its output on a terminal of its own: exit code and what was said."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    errors, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        done = blocks.run(block, folder, env, stdout=terminal, stderr=pipe)  # type: ignore[arg-type]
        os._exit(done.returncode)
    os.close(terminal)
    os.close(pipe)
    said = b"".join(_read({errors, screen}))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.decode().replace("\r\n", "\n")


def _read(sources: set[int]) -> Iterator[bytes]:
    """What comes out of several ends, as it comes, until all are closed."""
    while sources:
        for end in sorted(select.select(sources, [], [])[0]):
            try:
                chunk = os.read(end, 65536)
            except OSError:  # how Linux says that the other end of a terminal is closed
                chunk = b""
            if not chunk:
                os.close(end)
                sources.discard(end)
            yield chunk


def as_text(found: list[tuple[str, str]]) -> str:
    """A recording as a file of text, without colours."""
    lines: list[str] = []
    for prompt, said in found:
        lines += [
            f"$ {prompt}",
            *(line.rstrip() for line in Text.from_ansi(said).plain.split("\n")),
        ]
        while not lines[-1]:
            lines.pop()
        lines.append("")
    return "\n".join(lines)


def as_svg(found: list[tuple[str, str]], title: str) -> str:
    """A recording as a picture of a terminal that needs no font from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor",
                      force_terminal=True, legacy_windows=False)  # fmt: skip
    for prompt, said in found:
        console.print(Text.assemble(("$ ", "green"), (prompt, "bold")))
        console.print(Text.from_ansi(said.rstrip("\n")))
        console.print()
    drawn = console.export_svg(title=title, theme=THEME, code_format=FORMAT, unique_id="t")
    drawn = drawn.replace("TITLE", escape(title))
    return "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())


def main() -> None:
    """Run the sessions that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *sessions()], metavar="NAME")
    names = parser.parse_args().names or list(sessions())
    RECORDED.mkdir(exist_ok=True)
    for name in names:
        found = record(sessions()[name])
        (RECORDED / f"{name}.txt").write_text(as_text(found), encoding="utf-8")
        if name in PICTURES:
            shown = found if name != "tour" else [p for p in found if p[0].startswith(SHORT)]
            picture = as_svg(shown, PICTURES[name])
            (RECORDED / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
