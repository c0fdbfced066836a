"""One self-contained HTML page: sections, parts of them, and how they become a file.

Tables and plots are made anew from the JSON files of the run, so the page cannot disagree with
them. Templates, style and script lie beside this file; the plots' library goes into the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import mpq
from mpq.report.charts import Figure
from mpq.report.grid import Grid

HERE = Path(__file__).parent
OPEN_ROWS = 40
"""Tables with more rows are closed when the page opens."""


@dataclass(frozen=True, eq=False)
class Plot:
    """A plot with what it shows in words."""

    figure: Figure
    alt: str
    title: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a section: a macro of `parts.html`, its arguments, and its plots, which come last.

    `Part.table`, `Part.plots` and so on make the usual ones.
    """

    macro: str
    given: tuple[Any, ...] = ()
    plots: tuple[Plot, ...] = ()

    @classmethod
    def table(cls, grid: Grid, *, open: bool | None = None) -> Part:
        """A table that the reader can sort; a short one is open."""
        return cls("grid", (grid, len(grid.rows) <= OPEN_ROWS if open is None else open))


@dataclass(frozen=True)
class Section:
    """A section: `key` is its anchor, `lead` a sentence on what is to be seen."""

    key: str
    title: str
    parts: tuple[Part, ...]
    lead: str = ""


@dataclass(frozen=True)
class Head:
    """What stands on top: figures are (label, value, note)."""

    title: str
    eyebrow: str
    headline: str
    peers: str
    facts: Sequence[tuple[str, str, str]]


def render(head: Head, sections: Sequence[Section], source: str) -> str:
    """The text of a page.

    Args:
        head: what stands on top.
        sections: from top to bottom.
        source: what the page was made from, for its last line.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    macros = environment.get_template("parts.html").module
    parts = [part for section in sections for part in section.parts]
    plots = [plot for part in parts for plot in part.plots]
    script, slots = _embedded([plot.figure for plot in plots])
    slot = {plot: Markup(div) for plot, div in zip(plots, slots, strict=True)}
    rendered = {part: _rendered(macros, part, slot) for part in parts}
    return environment.get_template("page.html").render(
        title=head.title,
        eyebrow=head.eyebrow,
        headline=head.headline,
        peers=head.peers,
        facts=macros.facts(head.facts),  # type: ignore[attr-defined]
        sections=sections,
        rendered=rendered,
        source=source,
        version=mpq.__version__,
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        behaviour=(HERE / "page.js").read_text(encoding="utf-8"),
        library=_library(),
        script=script,
    )


def _embedded(figures: Sequence[Figure]) -> tuple[str, Sequence[str]]:
    """The script that draws plots, and a place for each."""
    if not figures:
        return "", []
    document = Document()
    with document.models.freeze():  # else all is counted anew for each of them
        for figure in figures:
            document.add_root(figure)
    script, places = components(list(figures))
    return script, places


def _rendered(macros: Any, part: Part, slot: dict[Plot, Markup]) -> Markup:
    given = part.given
    if part.plots:
        given = (*given, [(slot[plot], plot.alt, plot.title) for plot in part.plots])
    found: Markup = getattr(macros, part.macro)(*given)
    return found


@cache
def _library() -> str:
    """Bokeh's script for plots alone."""
    found = Resources(mode="inline", components=["bokeh"], log_level="error")
    return "\n".join(found.js_raw)
