"""The plots of the page, as bokeh figures; `page.js` gives them the colours of day or night.

Bokeh is chosen for its wheel: it brings its own script, which goes into the page as it is (1.3 MB;
plotly's has 4.8 MB, vega's comes with a JavaScript engine of 33 MB), and needs little else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, CustomJS, HoverTool, Range1d, Span, TapTool
from bokeh.plotting import figure

from mpq.report.plots import STYLES, shortened
from mpq.report.tables import SWEEPS, chosen_indices, swept, widths_text

Json = Mapping[str, Any]
Figure = Any  # bokeh's classes make their attributes at run time
PLURAL = {"weight": "weights", "activation": "inputs"}
NAMED = 32
"""Layers whose names find a place below a plot."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
COLOURS = {16: "#1a9e77", 8: "#3b82c4", 7: "#5b6fd0", 6: "#4fb0dc", 5: "#b96bb0", 4: "#e0742d",
           3: "#d9a21b", 2: "#c8453b", None: "#8a929c"}  # fmt: skip
"""Of each width, seen by day and by night, and told apart by colour-blind readers."""
SERIES = ("#3b82c4", "#e0742d", "#1a9e77", "#b96bb0", "#d9a21b", "#4fb0dc", "#c8453b")
MARKERS = {"s": "square", "o": "circle", "P": "cross", "D": "diamond", "^": "triangle",
           "v": "inverted_triangle", "X": "x"}  # fmt: skip


def blank(height: int, x: str = "", y: str = "", **more: Any) -> Figure:
    """An empty plot as wide as its place; neither wheel nor finger moves it."""
    made = figure(
        height=height,
        sizing_mode="stretch_width",
        min_width=0,
        toolbar_location=None,
        tools="",
        x_axis_label=x or None,
        y_axis_label=y or None,
        min_border_left=64,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        output_backend="canvas",
        **more,
    )
    made.min_border_right = 12
    made.xgrid.grid_line_color = None
    for axis in made.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_size, axis.major_label_text_font_size = "13px", "12px"
        axis.minor_tick_line_color, axis.major_tick_in = None, 0
    return made


def legend(made: Figure, place: str = "top_right") -> Figure:
    """The plot with its legend in a quiet form."""
    for box in made.legend:
        box.background_fill_alpha, box.border_line_color = 0.0, None
        box.label_text_font, box.label_text_font_size = FONT, "12px"
        box.glyph_height = box.glyph_width = 16
        box.spacing, box.padding, box.location = 0, 2, place
    return made


def above(made: Figure) -> Figure:
    """The plot with its legend in a line above it, where it covers nothing."""
    legend(made)
    for box in list(made.legend):
        box.orientation, box.location, box.margin = "horizontal", "left", 0
        box.spacing = 10
        made.add_layout(box, "above")
    return made


def front(sensitivity: Json) -> Figure:
    """The Pareto front; a click tells `page.js` which point is picked."""
    points = swept(sensitivity)
    x, y, label = front_axes(sensitivity)
    chosen = chosen_indices(sensitivity, points)
    log = y and min(y) > 0 and max(y) / min(y) > 30
    made = blank(350, label, "predicted drop", y_axis_type="log" if log else "auto")
    source = ColumnDataSource(
        {
            "x": x,
            "y": y,
            "bits": [f"{p['effective_bits']:.2f}" for p in points],
            "bytes": [f"{p['bytes']:,}" for p in points],
            "drop": [f"{p['predicted_drop']:.3g}" for p in points],
            "name": [chosen.get(i, "") for i in range(len(points))],
        },
        name="front",
    )
    made.line("x", "y", source=source, color=SERIES[0], width=1.5, nonselection_alpha=1.0)
    dots = made.scatter("x", "y", source=source, size=11, color=SERIES[0], line_color=None)
    dots.selection_glyph = dots.glyph.clone(size=17, fill_color=SERIES[1], tags=["outline"])
    dots.nonselection_glyph = dots.glyph.clone()
    told = [("bits", "@bits"), ("bytes", "@bytes"), ("predicted drop", "@drop"), ("", "@name")]
    made.add_tools(HoverTool(tooltips=told, renderers=[dots]), TapTool(renderers=[dots]))
    code = "if (cb_obj.indices.length) window.mpqPick(cb_obj.indices[0])"
    source.selected.js_on_change("indices", CustomJS(code=code))
    return made


def front_axes(sensitivity: Json) -> tuple[list[float], list[float], str]:
    """What the front is over, its predicted drops, and words for the former: bytes, if it can."""
    points = swept(sensitivity)
    key, label, unit = SWEEPS[sensitivity.get("sweep", "effective_bits")]
    if key in ("effective_bits", "bytes"):
        key, label, unit = "bytes", "predicted size of the file, kB", 1e3
    return [p[key] / unit for p in points], [p["predicted_drop"] for p in points], label


def bench(
    rows: Sequence[Json], spans: Sequence[tuple[float, float]], names: Sequence[str]
) -> Figure:
    """Accuracy over bytes of files, with intervals.

    Args:
        rows: lines of `bench.jsonl` that have a top-1.
        spans: the interval of each.
        names: of each.
    """
    made = blank(320, "size of the file, kB", "top-1, percent")
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    made.y_range = Range1d(low - 0.1 * (high - low), high + 0.1 * (high - low))
    made.x_range = Range1d(0, 1.06 * max(row["bytes"] for row in rows) / 1e3)
    for i, (row, span, name) in enumerate(zip(rows, spans, names, strict=True)):
        data = {"x": [row["bytes"] / 1e3], "y": [row["top1"]], "low": [span[0]], "high": [span[1]]}
        source, colour = ColumnDataSource(data), SERIES[i % len(SERIES)]
        made.segment("x", "low", "x", "high", source=source, color=colour, width=2)
        dots = made.scatter("x", "y", source=source, size=11, color=colour, legend_label=name)
        told = [("", name), ("kB", "@x{0.0}"), ("top-1", "@y{0.00}"),
                ("95 %", "@low{0.00} to @high{0.00}")]  # fmt: skip
        made.add_tools(HoverTool(tooltips=told, renderers=[dots]))
    above(made).legend.ncols = 2
    return made


def scores(sensitivity: Json, part: str) -> Figure:
    """Scores of one part of every layer, in the order in which they run."""
    names = [layer["name"] for layer in sensitivity["layers"]]
    place = {name: i for i, name in enumerate(names)}
    rows = [row for row in sensitivity["rows"] if row["part"] == part]
    floor = min((r["score"] for r in rows if r["score"] > 0), default=1e-9) / 2
    made = blank(230, "", f"score of {PLURAL[part]}", y_axis_type="log", x_range=_places(names))
    for bits in sorted({row["bits"] for row in rows}, reverse=True):
        mine = [row for row in rows if row["bits"] == bits]
        data = {
            "x": [place[row["layer"]] for row in mine],
            "y": [max(row["score"], floor) for row in mine],
            "name": [row["layer"] for row in mine],
            "score": [f"{row['score']:.3g}" for row in mine],
            "sqnr": ["-" if row["sqnr"] is None else f"{row['sqnr']:.1f} dB" for row in mine],
        }
        source, colour = ColumnDataSource(data), COLOURS.get(bits, COLOURS[None])
        made.line("x", "y", source=source, color=colour, alpha=0.35)
        dots = made.scatter(
            "x", "y", source=source, size=7, color=colour, legend_label=f"{bits} bits",
            marker=MARKERS[STYLES[bits][1]] if bits in STYLES else "circle",
        )  # fmt: skip
        told = [("", "@name"), (f"score at {bits} bits", "@score"), ("SQNR", "@sqnr")]
        made.add_tools(HoverTool(tooltips=told, renderers=[dots]))
    made.xaxis.visible = False
    return above(made)


def widths(sensitivity: Json) -> Figure:
    """The chosen widths along the network, bars as wide as the layers are many."""
    names = [layer["name"] for layer in sensitivity["layers"]]
    chosen = sensitivity["chosen"]
    made = blank(170, "layer, from input to output", "bits", x_range=_places(names))
    pairs = [chosen[name] for name in names]
    data = {
        "x": list(range(len(names))),
        "weight": [pair[0] or 32 for pair in pairs],
        "activation": [pair[1] or 32 for pair in pairs],
        "colour": [COLOURS.get(pair[0], COLOURS[None]) for pair in pairs],
        "name": names,
        "widths": [widths_text(pair) for pair in pairs],
    }
    source = ColumnDataSource(data)
    bars = made.vbar("x", top="weight", width=0.8, source=source, color="colour", line_color=None)
    made.step(
        "x", "activation", source=source, mode="center", color="#8a929c", width=1.5,
        legend_label="input",
    )  # fmt: skip
    made.add_tools(HoverTool(tooltips=[("", "@name"), ("widths", "@widths")], renderers=[bars]))
    used = [bits or 32 for pair in pairs for bits in pair]
    top = max(used, default=8)
    made.y_range = Range1d(0, top * 1.08)
    made.yaxis.ticker = sorted({0, *used})
    if len(names) <= NAMED:
        made.xaxis.ticker, made.xaxis.axis_label = list(range(len(names))), None
        made.xaxis.major_label_overrides = {i: shortened(n, 18) for i, n in enumerate(names)}
        made.xaxis.major_label_orientation, made.height = math.pi / 2, 250
        made.xaxis.major_label_text_font_size = "11px"
    return above(made)


def _places(names: Sequence[str]) -> Range1d:
    return Range1d(-0.8, max(len(names), 1) - 0.2)


def validation(found: Json) -> Figure:
    """Predicted against measured divergence, both on log scales."""
    seen = [p for p in found["policies"] if p["predicted"] > 0 and p["kl"] > 0]
    made = blank(320, "predicted drop", "measured divergence, nats",
                 x_axis_type="log", y_axis_type="log")  # fmt: skip
    source = ColumnDataSource(
        {
            "x": [p["predicted"] for p in seen],
            "y": [p["kl"] for p in seen],
            "bits": [f"{p['effective_bits']:.2f}" for p in seen],
            "top1": ["-" if p["top1"] is None else f"{p['top1']:.2f}" for p in seen],
        }
    )
    dots = made.scatter("x", "y", source=source, size=9, color=SERIES[0], alpha=0.75)
    told = [("bits", "@bits"), ("predicted", "@x{0.0000}"), ("measured", "@y{0.0000}"),
            ("top-1", "@top1")]  # fmt: skip
    made.add_tools(HoverTool(tooltips=told, renderers=[dots]))
    return made


CURVES = {
    "train_loss": "all",
    "train_label_loss": "of labels",
    "train_distill_loss": "of teachers",
    "train_top1": "training",
    "val_top1": "held out",
    "lr": "of the step",
}
"""What legends call the values of `metrics.jsonl`, short enough for a phone."""


def curves(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Some of the curves of a training: (epoch, value) by name; the title stands above it."""
    made = blank(240, "epoch")
    for i, (name, points) in enumerate(lines.items()):
        epochs, values = zip(*points, strict=True)
        source = ColumnDataSource({"x": epochs, "y": values})
        colour = SERIES[i % len(SERIES)]
        label = CURVES.get(name, name)
        made.line("x", "y", source=source, color=colour, width=2, legend_label=label)
        dots = made.scatter("x", "y", source=source, color=colour, size=5)
        told = [("", name), ("epoch", "@x"), (title, "@y{0.0000}")]
        made.add_tools(HoverTool(tooltips=told, renderers=[dots]))
    return above(made)


def histogram(found: Json, title: str) -> Figure:
    """Counts of values on a log scale, with the range that the integers cover shaded.

    Args:
        found: low, high, counts, and the range: `from`, `to`.
        title: below the plot.
    """
    counts, low, high = found["counts"], found["low"], found["high"]
    step = (high - low) / max(len(counts), 1)
    edges = [low + step * i for i in range(len(counts) + 1)]
    made = blank(170, title, "", y_axis_type="log", y_range=Range1d(0.5, 2 * max([1, *counts])))
    if found["from"] is not None:
        made.quad(left=found["from"], right=found["to"], bottom=0.5, top=2 * max([1, *counts]),
                  color=COLOURS[found["bits"]], alpha=0.16, line_color=None)  # fmt: skip
        for at in (found["from"], found["to"]):
            colour = COLOURS[found["bits"]]
            made.add_layout(Span(location=at, dimension="height", line_color=colour, line_width=2))
    source = ColumnDataSource(
        {"left": edges[:-1], "right": edges[1:], "top": [max(c, 0.5) for c in counts], "n": counts}
    )
    bars = made.quad("left", "right", "top", 0.5, source=source, color="#8a929c", line_color=None)
    told = [("from", "@left{0.0000}"), ("to", "@right{0.0000}"), ("values", "@n{0,0}")]
    made.add_tools(HoverTool(tooltips=told, renderers=[bars]))
    made.yaxis.visible, made.ygrid.grid_line_color, made.min_border_left = False, None, 8
    return made


def fronts(named: Mapping[str, Json]) -> Figure:
    """The fronts of several runs of one network over bytes, the chosen points marked."""
    made = blank(340, "predicted size of the file, kB", "predicted drop")
    for i, (name, sensitivity) in enumerate(named.items()):
        points = sorted(swept(sensitivity), key=lambda p: p["bytes"])
        data = {
            "x": [p["bytes"] / 1e3 for p in points],
            "y": [p["predicted_drop"] for p in points],
            "bits": [f"{p['effective_bits']:.2f}" for p in points],
        }
        source, colour = ColumnDataSource(data), SERIES[i % len(SERIES)]
        made.line("x", "y", source=source, color=colour, width=1.5, legend_label=name)
        dots = made.scatter("x", "y", source=source, color=colour, size=6)
        marked = list(chosen_indices(sensitivity, points))
        made.scatter([data["x"][k] for k in marked], [data["y"][k] for k in marked],
                     marker="star", size=18, color=colour)  # fmt: skip
        told = [("", name), ("bits", "@bits"), ("kB", "@x{0.0}"), ("drop", "@y{0.0000}")]
        made.add_tools(HoverTool(tooltips=told, renderers=[dots]))
    return above(made)
