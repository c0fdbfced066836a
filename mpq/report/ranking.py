"""The table and the picture of `mpq rank`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mpq.noise import margin
from mpq.report.grid import Grid, columns, fixed, short, tiny
from mpq.report.plots import STYLES, clean, shortened

Json = Mapping[str, Any]
_POINTS = (("8", "8 bits", STYLES[8]), ("mixed", "mixed", ("#009E73", "*")),
           ("4", "4 bits", STYLES[4]))  # fmt: skip


def rank_table(rows: Sequence[Json]) -> Grid:
    """Candidates, best first: `rows` are those of `rank.json`."""
    heads = columns("network", "#top-1", "#8 bits", "#4 bits", "#mixed", "#bits", "#per bit")
    heads += columns("?#KL", "#kB", "?#float", "#GBitOps")
    body = []
    for row in rows:
        forms = row["forms"]
        mixed = forms["mixed"]
        body.append(
            (
                _short(row["name"]),
                fixed(row["top1"], 2),
                _change(forms["8"]["drop"]),
                _change(forms["4"]["drop"]),
                _change(mixed["drop"]),
                fixed(mixed["effective_bits"], 2),
                _change(row["drop_per_bit"]),
                tiny(mixed["kl"]),
                f"{mixed['bytes'] / 1e3:,.0f}",
                short(row["float_bytes"]),
                f"{mixed['bitops'] / 1e9:.3g}",
            )
        )
    images = ", ".join(f"{n:,}" for n in sorted({row["images"] for row in rows}))
    note = (
        f"top-1 of the float network in percent of {images} validation images and what is lost of "
        "it, in points; per bit: for each effective bit below 8; kB, GBitOps: of the mixed policy; "
        f"{_chance(rows)}"
    )
    return Grid("Networks by how well they take low precision", heads, tuple(body), note)


def _chance(rows: Sequence[Json]) -> str:
    """Points below which a loss may be chance, and who loses more than that."""
    noise = max((margin(row["top1"], row["top1"], row["images"]) for row in rows), default=0.0)
    lost = [_short(row["name"]) for row in rows
            if max(form["drop"] or 0.0 for form in row["forms"].values()) > noise]  # fmt: skip
    told = f"chance explains {noise:.2f} points"
    return f"{told}; beyond it lose {', '.join(lost)}" if lost else f"{told}: no loss is beyond it"


def _change(drop: float | None) -> str:
    """What is lost as a change of top-1: `-0.35`, `0.00`, or `-` for what is not known."""
    if drop is None:
        return "-"
    text = f"{-drop:+.2f}"
    return text if float(text) else "0.00"


def _short(name: str) -> str:
    """A path's last part, its middle left out where it is long."""
    return shortened(name.rpartition("/")[2], 24)


def rank_plot(rows: Sequence[Json]) -> Figure:
    """Size of the file against top-1, a line from 8 to 4 bits for each network."""
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        forms = row["forms"]
        spots = [(forms[form]["bytes"] / 1e3, forms[form]["top1"]) for form, _, _ in _POINTS]
        axis.plot(*zip(*spots, strict=True), color="#bbbbbb", lw=1.2, zorder=1)
        axis.hlines(row["top1"], spots[-1][0], spots[0][0], color="#dddddd", lw=0.9, ls=":")
        right = max(spots)
        axis.annotate(
            _short(row["name"]), right, xytext=(7, 0), textcoords="offset points", fontsize=8,
            va="center",
        )  # fmt: skip
    for form, label, (colour, marker) in _POINTS:
        x = [row["forms"][form]["bytes"] / 1e3 for row in rows]
        y = [row["forms"][form]["top1"] for row in rows]
        size = 90 if marker == "*" else 34
        axis.scatter(x, y, s=size, color=colour, marker=marker, lw=0, label=label, zorder=3)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.2)
    axis.set_xlabel("predicted size of the file, kB")
    axis.set_ylabel("top-1, percent (dotted: float)")
    clean(axis, legend="best")
    return figure
