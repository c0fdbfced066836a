"""`Grid`: a table as data, shown on a terminal (rich) and in the HTML page alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mpq.errors import printable
from mpq.report.words import decibels


@dataclass(frozen=True, slots=True)
class Column:
    """Head of a column.

    Args:
        title: the head.
        number: flush right and never broken.
        spare: left out where a terminal is too narrow for all columns.
    """

    title: str
    number: bool = False
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts.

    Args:
        title: above the table.
        columns: the heads.
        rows: as many texts each as there are columns.
        note: below the table.
        marked: indices of rows that stand out.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        odd = [i for i, row in enumerate(self.rows) if len(row) != len(self.columns)]
        if odd:
            raise ValueError(
                f"rows of table {self.title!r} must have {len(self.columns)} texts. "
                f"Row {odd[0]} has {len(self.rows[odd[0]])}."
            )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For a terminal: spare columns go first, then texts are folded, until it fits."""
        shown = self._fitting(options.max_width)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for column in (self.columns[i] for i in shown):
            table.add_column(
                column.title,
                justify="right" if column.number else "left",
                no_wrap=column.number,
                overflow="fold",
            )
        for i, row in enumerate(self.rows):
            # Text, not markup: a layer may be called `blocks[0]`.
            cells = [Text(printable(row[k])) for k in shown]
            table.add_row(*cells, style="bold" if i in self.marked else None)
        yield Text(self.title, style="bold")
        yield table
        if self.note:
            yield Text(self.note, style="dim")

    def html(self) -> str:
        """As a `<table>`, with the note below it."""
        kinds = [' class="number"' if column.number else "" for column in self.columns]
        lines = [_row("th", [column.title for column in self.columns], kinds)]
        for i, row in enumerate(self.rows):
            kind = ' class="marked"' if i in self.marked else ""
            lines.append(_row("td", row, kinds, kind))
        note = f'\n<p class="note">{escape(self.note)}</p>' if self.note else ""
        head, body = lines[0], "\n".join(lines[1:])
        return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{note}"

    def _fitting(self, width: int) -> list[int]:
        """Indices of the columns to show on `width` characters."""
        shown = list(range(len(self.columns)))
        while self._width(shown) > width and any(self.columns[i].spare for i in shown):
            shown.remove(next(i for i in shown if self.columns[i].spare))
        return shown

    def _width(self, shown: list[int]) -> int:
        total = _GAP * (len(shown) - 1)
        for i in shown:
            longest = max(len(text) for text in (self.columns[i].title, *(r[i] for r in self.rows)))
            total += longest if self.columns[i].number else min(longest, _FOLD)
        return total


def _row(cell: str, texts: Sequence[str], kinds: Sequence[str], kind: str = "") -> str:
    pairs = zip(texts, kinds, strict=True)
    cells = "".join(f"<{cell}{of}>{escape(text)}</{cell}>" for text, of in pairs)
    return f"<tr{kind}>{cells}</tr>"


def plain(shown: Iterable[Grid | str], width: int = 80) -> str:
    """Tables and lines as a terminal of that width shows them, without colours."""
    console = Console(file=StringIO(), width=width, highlight=False)
    for one in shown:
        console.print(one, markup=False, soft_wrap=isinstance(one, str))
    return str(console.file.getvalue()).rstrip("\n")  # type: ignore[attr-defined]


def html(shown: Iterable[Grid | str]) -> str:
    """Tables and lines as a notebook shows them."""
    return "\n".join(
        f"<p>{escape(one)}</p>"
        if isinstance(one, str)
        else f"<b>{escape(one.title)}</b>{one.html()}"
        for one in shown
    )


_GAP = 2  # characters between columns
_FOLD = 24  # texts longer than this may be folded


def columns(*heads: str) -> tuple[Column, ...]:
    """Columns by title; `#` before it makes a number column, `?` before that a spare one."""
    return tuple(
        Column(h.lstrip("?#"), number=h.lstrip("?").startswith("#"), spare=h.startswith("?"))
        for h in heads
    )


def counted(count: int, one: str, many: str = "") -> str:
    """A number and what it counts: `1 image`, `1,000 images`; `many` where no `s` makes it."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def short(value: float | None) -> str:
    """A count in three or four characters and a unit: `18.4k`, `1.18M`, `512`."""
    if value is None:
        return "-"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def tiny(value: float | None) -> str:
    """A score of any magnitude: `1.2e-4`, `0.031`, `0`."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value) or 1e-2 <= abs(value) < 1e3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals, `-` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


TOP1 = "top-1 agreement "


def agreement_text(verify: Mapping[str, Any]) -> str:
    """How near the file's answers are to the simulation's: top-1, or each output by its kind."""
    if verify["top1_agreement"] is not None:
        return f"{TOP1}{verify['top1_agreement']:.2%}"
    told = []
    for one in verify["outputs"]:
        if one["agreement"] is not None:
            told.append(f"{one['name']} ({one['kind']}) agreement {one['agreement']:.2%}")
        elif one["sqnr_db"] is not None:
            told.append(f"{one['name']} ({one['kind']}) {decibels(one['sqnr_db'], ' dB')}")
    return ", ".join(told) or "no output is judged"
