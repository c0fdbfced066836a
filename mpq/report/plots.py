"""The pictures of a run, as matplotlib figures; `png` gives their bytes.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers, and every width has
a marker of its own besides. Figures are made without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpq.diagnose.facts import score_unit
from mpq.report.tables import PARTS, SWEEPS, chosen_indices, swept

Json = Mapping[str, Any]
STYLES = {
    16: ("#009E73", "s"),
    8: ("#0072B2", "o"),
    6: ("#56B4E9", "P"),
    5: ("#CC79A7", "D"),
    4: ("#D55E00", "^"),
    3: ("#E69F00", "v"),
    2: ("#000000", "X"),
}
"""Colour and marker of each width."""
GREY = "#666666"
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def png(figure: Figure, *, dpi: int = 130) -> bytes:
    """The picture as a PNG file."""
    buffer, figure.dpi = io.BytesIO(), dpi
    FigureCanvasAgg(figure).print_png(buffer)  # print_figure would lay it out in a drawing before
    return buffer.getvalue()


def sensitivity_plot(sensitivity: Json) -> Figure:
    """Scores on a log scale, a row for each layer; the decided width ringed."""
    names = [layer["name"] for layer in sensitivity["layers"]]
    parts = [p for p in PARTS if any(r["part"] == p for r in sensitivity["rows"])]
    height = 1.5 + max(0.2 * len(names), 1.2)
    width = 3.2 + 3.4 * len(parts)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, max(len(parts), 1), sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=False):
        _score_panel(axis, sensitivity, part, names)
    axes[0].set_yticks(range(len(names)), [shortened(n) for n in names], fontsize=8)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # the first layer on top
    zero = "; 0 stands at the left" if any(r["score"] <= 0 for r in sensitivity["rows"]) else ""
    basis = f"{sensitivity['metric']}, {sensitivity['samples']} images"
    figure.supxlabel(f"score ({basis}): further right hurts more{zero}", fontsize=9)
    return figure


def shortened(name: str, longest: int = 36) -> str:
    """A name, its middle left out where it would push the plot off the page."""
    half = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:half]}...{name[-half:]}"


def _score_panel(axis: Axes, sensitivity: Json, part: str, names: Sequence[str]) -> None:
    rows = [r for r in sensitivity["rows"] if r["part"] == part]
    place = {name: i for i, name in enumerate(names)}
    positive = [r["score"] for r in rows if r["score"] > 0]
    floor = min(positive, default=1e-9) / 2  # where a score of 0 stands on a log scale
    for name in names:
        spots = [max(r["score"], floor) for r in rows if r["layer"] == name]
        if spots:
            axis.hlines(place[name], min(spots), max(spots), color="#dddddd", lw=1.2, zorder=1)
    for bits in sorted({r["bits"] for r in rows}, reverse=True):
        _score_dots(axis, [r for r in rows if r["bits"] == bits], place, floor, bits)
    index, chosen = 0 if part == "weight" else 1, sensitivity.get("chosen") or {}
    picked = [r for r in rows if (chosen.get(r["layer"]) or (None, None))[index] == r["bits"]]
    if picked:
        spots = [max(r["score"], floor) for r in picked]
        rings = [place[r["layer"]] for r in picked]
        axis.scatter(
            spots, rings, s=95, facecolors="none", edgecolors="black", lw=1.1, label="decided"
        )
    axis.set_xscale("log")
    axis.set_title(f"{part}s", fontsize=10)
    clean(axis)
    axis.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0 + 0.25 / max(0.2 * len(names), 1.2)),
        ncols=4,
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
        columnspacing=0.9,
    )


def _score_dots(
    axis: Axes, rows: Sequence[Json], place: Mapping[str, int], floor: float, bits: int
) -> None:
    colour, marker = STYLES.get(bits, (GREY, "o"))
    spots = [max(r["score"], floor) for r in rows]
    rings = [place[r["layer"]] for r in rows]
    axis.scatter(
        spots, rings, s=24, color=colour, marker=marker, lw=0, label=f"{bits} bits", zorder=3
    )


def pareto_plot(sensitivity: Json) -> Figure:
    """What the front is over (effective weight bits) against predicted drop; the chosen marked."""
    front = swept(sensitivity)
    key, label, unit = SWEEPS[sensitivity.get("sweep", "effective_bits")]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    costs = [c[key] / unit for c in front]
    drops = [c["predicted_drop"] for c in front]
    axis.plot(costs, drops, color=STYLES[8][0], lw=1.2, marker="o", ms=3.5, label="Pareto front")
    if drops and min(drops) > 0 and max(drops) / min(drops) > 30:
        axis.set_yscale("log")
    for place, (index, name) in enumerate(chosen_indices(sensitivity, front).items()):
        spot = costs[index], drops[index]
        _mark_chosen(axis, spot, front[index], name, _LINES[(place + 1) % len(_LINES)])
    axis.set_xlabel(label)
    axis.set_ylabel(f"predicted drop, {score_unit(sensitivity['metric'])}")
    clean(axis, legend="upper right")
    return figure


def _mark_chosen(
    axis: Axes, spot: tuple[float, float], chosen: Json, name: str, colour: str
) -> None:
    # Its figures stand in the legend, where they cannot cover the curve.
    size = f"{chosen['effective_bits']:.2f} bits, {chosen['bytes'] / 1e3:,.0f} kB"
    label = f"{name}: {size}, drop {spot[1]:.3g}"
    axis.plot(*spot, "*", color=colour, ms=15, mec="black", mew=0.7, ls="", label=label)


def validation_plot(validation: Json) -> Figure:
    """Predicted against measured divergence of random configurations, both on log scales."""
    policies = validation["policies"]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    points = [(p["predicted"], p["kl"], p["effective_bits"]) for p in policies]
    seen = [p for p in points if p[0] > 0 and p[1] > 0]
    if seen:
        predicted, measured, bits = zip(*seen, strict=True)
        dots = axis.scatter(predicted, measured, c=bits, cmap="cividis", s=22, lw=0)
        figure.colorbar(dots, ax=axis, label="effective weight bits")
        axis.set_xscale("log")
        axis.set_yscale("log")
    rho = "-" if validation["rho"] is None else f"{validation['rho']:.3f}"
    axis.set_title(f"{validation['metric']}: Spearman's rho {rho}", fontsize=10)
    axis.set_xlabel(f"predicted drop, {score_unit(validation['metric'])}")
    axis.set_ylabel(f"measured divergence, nats ({validation['images']} images)")
    clean(axis)
    return figure


def bench_plot(rows: Sequence[Json]) -> Figure:
    """Accuracy over bytes of model files, each named at its point: `rows` of `bench.jsonl`."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for i, row in enumerate(r for r in rows if r["top1"] is not None):
        at, name = (row["bytes"] / 1e3, row["top1"]), Path(row["file"]).stem
        axis.plot(*at, "o", color=_LINES[i % len(_LINES)], ms=7)
        axis.annotate(name, at, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("file, kB")
    axis.set_ylabel("top-1, percent")
    axis.margins(x=0.15)
    clean(axis)
    return figure


def clean(axis: Axes, *, legend: str = "") -> None:
    """Take away what a plot does not need; curves get their legend there, and lines of height."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors="#333333")
    if legend:
        axis.grid(axis="y", color="#eeeeee")
        axis.legend(loc=legend, fontsize=8, frameon=False)
