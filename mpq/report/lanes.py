"""Where the dots and lines of a graph are drawn: one row of pixels a node, one column a lane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpq.report.wires import Row

ROW = 32
"""Height of a row, as in `page.css`."""
LANE, WIDEST = 14.0, 112.0
"""Distance of lanes, and of the first from the last: many move together."""


@dataclass(frozen=True)
class Drawing:
    """A picture: paths and dots, each with whether it is float."""

    width: int
    height: int
    paths: tuple[tuple[str, bool], ...]
    dots: tuple[tuple[float, float, bool], ...]
    begins: frozenset[int]

    @classmethod
    def of(cls, rows: Sequence[Row], begins: Sequence[int]) -> Drawing:
        """The picture of a graph.

        Args:
            rows: its nodes.
            begins: those at which float begins.
        """
        lanes = max((row.lane for row in rows), default=0)
        step = min(LANE, WIDEST / max(lanes, 1))
        x = [14 + step * row.lane for row in rows]
        y = [ROW * i + ROW / 2 for i in range(len(rows))]
        paths = [
            (_path((x[k], y[k]), (x[i], y[i])), not rows[k].integer)
            for i, row in enumerate(rows)
            for k in row.inputs
            if k >= 0
        ]
        dots = [(x[i], y[i], not row.integer) for i, row in enumerate(rows)]
        width = round(28 + step * lanes)
        return cls(width, ROW * len(rows), tuple(paths), tuple(dots), frozenset(begins))


def _path(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Down the lane of the value, then over to its reader."""
    (x0, y0), (x1, y1) = start, end
    if x0 == x1:
        return f"M{x0:g} {y0:g}V{y1:g}"
    turn = y1 - ROW
    return f"M{x0:g} {y0:g}V{turn:g}C{x0:g} {turn + 18:g} {x1:g} {turn + 14:g} {x1:g} {y1:g}"
