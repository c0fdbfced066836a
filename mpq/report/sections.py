"""The sections of a run's page, from top to bottom; each is None where the run lacks its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mpq import origins, rundir
from mpq.diagnose import Facts, findings
from mpq.diagnose.finding import listed
from mpq.errors import UsageError
from mpq.noise import interval
from mpq.report import charts, tables
from mpq.report.commands import commands
from mpq.report.contents import Contents
from mpq.report.front import picked
from mpq.report.grid import Grid, columns, counted, fixed
from mpq.report.headline import PEERS, measured, named, named_short, results_table
from mpq.report.lanes import Drawing
from mpq.report.render import Part, Plot, Section
from mpq.report.trained import demo_table
from mpq.report.wires import begins_float
from mpq.report.wires import rows as graph_rows

Json = Mapping[str, Any]


def sections(run: Contents) -> list[Section]:
    """All that the run has."""
    return [found for make in SECTIONS if (found := make(run)) is not None]


def left_out(run: Contents) -> Section | None:
    """What the run holds and the page does not show, since it is of something else."""
    reasons = run.doubts()
    return Section("left-out", "Left out", (Part("warnings", (reasons,)),)) if reasons else None


def results(run: Contents) -> Section | None:
    """The file beside float and beside peers."""
    rows = measured(run)
    if not rows:
        return None
    parts: tuple[Part, ...] = (Part.table(results_table(rows), open=True),)
    seen = [row for row in rows if row["top1"] is not None]
    if seen:
        names = [named_short(row["file"]) for row in seen]
        alt = "; ".join(
            f"{name}: {row['bytes'] / 1e3:,.0f} kB, top-1 {row['top1']:.2f} %"
            for name, row in zip(names, seen, strict=True)
        )
        spans = [interval(row["top1"], row["n"]) for row in seen]
        plot = Plot(charts.bench(seen, spans, names), f"Accuracy over size. {alt}")
        parts = (Part("plot", plots=(plot,)), *parts)
    peers = [file for file in PEERS if named(rows, file)]
    lead = "" if peers else (
        f"No peer was measured: mpq bench --peers {run.folder}/model.onnx does it."
    )  # fmt: skip
    return Section("results", "Accuracy, size and speed", parts, lead)


def front(run: Contents) -> Section | None:
    """The Pareto front to pick from."""

    def made(scores: Json) -> Section | None:
        points = tables.swept(scores)
        if not points:
            return None
        x, y, label = charts.front_axes(scores)
        alt = (
            f"Pareto front of {counted(len(points), 'configuration')} over {label}: "
            f"from {x[0]:,.4g} with a predicted drop of {y[0]:.3g} to {x[-1]:,.4g} with {y[-1]:.3g}"
        )
        data = picked(scores, run.policy, run.folder) if run.policy else None
        lead = (
            "Every point is the best that the search found for its cost. Pick one by a click, or "
            "with the slider and the arrow keys; its policy goes straight into mpq ptq or mpq qat."
        )
        parts = (
            Part("front", (data,), (Plot(charts.front(scores), alt),)),
            Part.table(tables.configurations_table(scores), open=False),
        )
        return Section("front", "Pareto front", parts, lead)

    return run.read("sensitivity.json", made)


def layers(run: Contents) -> Section | None:
    """Scores and chosen widths along the network."""

    def made(scores: Json) -> Section | None:
        scored = {row["part"] for row in scores["rows"] if row["score"] > 0}
        parts = [part for part in tables.PARTS if part in scored]
        plots = [Plot(charts.scores(scores, part), _worst(scores, part)) for part in parts]
        if scores.get("chosen"):
            alt = "Chosen widths along the network; the table below has them layer by layer"
            plots.append(Plot(charts.widths(scores), alt))
        lead = (
            f"Score: what quantizing this layer alone adds to the loss ({scores['metric']}, "
            f"{counted(scores['samples'], 'image') if scores['samples'] else 'no images'}); "
            "higher hurts more."
        )
        table = Part.table(tables.sensitivity_table(scores))
        shown = (Part("plot", plots=tuple(plots)), table) if plots else (table,)
        return Section("layers", "Sensitivity and bits along the network", shown, lead)

    return run.read("sensitivity.json", made)


def _worst(scores: Json, part: str) -> str:
    rows = sorted((r for r in scores["rows"] if r["part"] == part), key=lambda r: -r["score"])
    told = ", ".join(f"{r['layer']} at {r['bits']} bits {r['score']:.3g}" for r in rows[:3])
    return f"Scores of the {part}s of every layer, in the order in which they run. Highest: {told}"


def diagnosis(run: Contents) -> Section | None:
    """Causes and remedies, as `mpq diagnose` tells them, and what is not known."""
    try:
        found = findings(Facts.of(run.folder))
    except UsageError:  # the section that shows that file says what is wrong with it
        return None
    told = [{**asdict(f), "where": listed(f.where) or "whole network"} for f in found.findings]
    if not told:
        return None
    unknown = "; ".join(f"{name}: {command}" for name, command in found.missing.items())
    lead = f"Not asked, since it is not there: {unknown}." if unknown else ""
    return Section("diagnosis", "Diagnosis", (Part("findings", (told,)),), lead)


def ranges(run: Contents) -> Section | None:
    """Histograms of the worst layers with their ranges."""

    def made(found: Json) -> Section | None:
        parts = [_range(one) for one in found["layers"]]
        seen = counted(found["images"], "image") if found["images"] else "no images"
        lead = (
            "The layers that cost most at their widths. Shaded: what their integers cover. Inputs "
            f"as seen on {seen} of {found['data']}; counts are on a log scale."
        )
        table = Part.table(_ranges_table(found["layers"]))
        return Section("ranges", "Weights and inputs of the worst layers", (*parts, table), lead)

    of_model = run.made_of is None or origins.is_of(run.folder / "ranges.json", run.made_of)
    return run.read("ranges.json", made) if of_model else None


def _range(one: Json) -> Part:
    titles = (
        ("weight", "weights, in steps of their channel"),
        ("activation", "values of the input"),
    )
    plots = []
    for part, title in titles:
        found = one[part]
        if found is not None:
            alt = (
                f"{title} of {one['layer']}: {found['low']:.3g} to {found['high']:.3g}, covered "
                f"from {found['from']:.3g} to {found['to']:.3g}"
            )
            name = {"weight": "weights", "activation": "input"}[part]
            shown = f"{one['layer']}, {name} at {found['bits']} bits"
            plots.append(Plot(charts.histogram(found, title), alt, shown))
    return Part("plots", ("pair",), tuple(plots))


def _ranges_table(found: Sequence[Json]) -> Grid:
    heads = columns("layer", "tensor", "#bits", "#from", "#to", "#covered from", "#to", "#outside")
    heads += columns("#SQNR dB")
    body = [
        (
            one["layer"],
            part,
            str(one[part]["bits"]),
            *(f"{one[part][key]:.3g}" for key in ("low", "high", "from", "to")),
            f"{one[part]['clipped']:.3%}",
            fixed(one[part]["sqnr"], 1),
        )
        for one in found
        for part in ("weight", "activation")
        if one[part] is not None
    ]
    return Grid("Ranges in figures", heads, tuple(body))


def graph(run: Contents) -> Section | None:
    """The exported file as a graph, with widths and where float begins."""
    path = run.path("model.onnx")
    if path is None:
        return None
    certificate = run.read("certificate.json", lambda found: found)
    rows = graph_rows(path, certificate)
    begins = begins_float(rows)
    floats = sum(not row.integer for row in rows)
    lead = f"{path.name}, {counted(len(rows), 'node')} from input to output. "
    lead += "Everything runs on integers." if not floats else (
        f"{counted(floats, 'node')} in float (dashed); float begins at "
        f"{counted(len(begins), 'place')}."
    )  # fmt: skip
    part = Part("graph", (rows, Drawing.of(rows, begins)))
    return Section("graph", "Graph of the exported file", (part,), lead)


def validation(run: Contents) -> Section | None:
    """Predicted against measured."""

    def made(found: Json) -> Section:
        rho = fixed(found["rho"], 3)
        alt = (
            f"Predicted drop against measured divergence of {len(found['policies'])} random "
            f"policies: Spearman's rho {rho}"
        )
        table = Part.table(tables.validation_table(found), open=False)
        parts = (Part("plot", plots=(Plot(charts.validation(found), alt),)), table)
        lead = (
            f"Random policies, predicted by the scores and measured on "
            f"{counted(found['images'], 'image')} that were not scored: Spearman's rho {rho} "
            "(1: the order is right)."
        )
        return Section("validation", "Predicted against measured", parts, lead)

    return run.read("validation.json", made)


def training(run: Contents) -> Section | None:
    """The curves of `qat.pth`, unless the model is of another stage."""
    if run.made_of == rundir.STAGES["ptq"]:
        return None

    def made(records: Sequence[Json]) -> Section | None:
        panels = curves_of(records)
        if not panels:
            return None
        plots = tuple(
            Plot(charts.curves(title, lines), f"{title} over the epochs. {_ends(lines)}", title)
            for title, lines in panels.items()
        )
        keys = list(dict.fromkeys(key for row in records for key in row))
        body = tuple(tuple(_cell(row.get(key)) for key in keys) for row in records)
        table = Grid("Epochs", columns(*(f"#{key}" for key in keys)), body)
        if len(records) == 1:  # which makes no curve
            return Section("training", "Training", (Part.table(table),))
        parts = (Part("plots", ("plots",), plots), Part.table(table, open=False))
        return Section("training", "Training", parts)

    return run.read("metrics.jsonl", made)


Lines = dict[str, list[tuple[float, float]]]
PANELS = {"loss": ("loss",), "top-1, percent": ("top1", "acc"), "learning rate": ("lr",)}


def curves_of(records: Sequence[Json]) -> dict[str, Lines]:
    """Panels of curves; those of teachers' weights, of which a record has a list, are the last."""
    found: dict[str, Lines] = {}
    for at, record in enumerate(records):
        values = {**record, **_teachers(record)}
        for key, value in values.items():
            title = next((t for t, words in PANELS.items() if any(w in key for w in words)), "")
            title = "weights of the teachers" if key.startswith("teacher ") else title
            if title and _number(value):
                lines = found.setdefault(title, {})
                lines.setdefault(key, []).append((record.get("epoch", at), value))
    order = [*PANELS, "weights of the teachers"]
    return {title: found[title] for title in order if title in found}


def _teachers(record: Json) -> dict[str, float]:
    weights = record.get("teacher_weights") or ()
    return {f"teacher {i}": weight for i, weight in enumerate(weights, 1)}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{v:.3g}" for v in value)
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _ends(lines: Lines) -> str:
    return "; ".join(f"{n}: from {p[0][1]:.4g} to {p[-1][1]:.4g}" for n, p in lines.items())


def _table(
    key: str, title: str, name: str, make: Callable[[Any], Grid], lead: str = ""
) -> Callable[[Contents], Section | None]:
    """A section that is one table of one file."""

    def section(run: Contents) -> Section | None:
        grid = run.read(name, make)
        return Section(key, title, (Part.table(grid),), lead) if grid else None

    return section


def policy(run: Contents) -> Section | None:
    """The policy as it is in its file."""
    path = run.folder / "policy.yaml"
    if run.policy is None:
        return None
    text = Part("text", (path.read_text(encoding="utf-8"), "policy.yaml"))
    return Section("policy", "Policy", (text,))


def again(run: Contents) -> Section:
    """Commands that make the run again, and its files."""
    files = tuple((path.name, f"{path.stat().st_size:,}") for path in run.there)
    table = Part.table(Grid("Files", columns("file", "#bytes"), files), open=False)
    told = commands(run)
    parts = (Part("text", (told, "")), table) if told else (table,)
    lead = "Options that the files do not tell, such as --teacher, are left out." if told else ""
    return Section("repeat", "Commands that repeat it", parts, lead)


SECTIONS: tuple[Callable[[Contents], Section | None], ...] = (
    left_out,
    results,
    _table("demo", "Configurations of the demo", "demo.json", demo_table),
    front,
    layers,
    diagnosis,
    ranges,
    graph,
    validation,
    training,
    _table("certificate", "Certificate", "certificate.json", tables.certificate_table,
           "What onnxruntime executes for each layer, read from its own optimized graph."),
    _table("verification", "Verification", "verify.json", tables.verify_table,
           "The file in onnxruntime against the simulation in PyTorch, layer by layer."),
    _table("portability", "Other runtimes", "portability.json", tables.portability_table),
    policy,
    again,
)  # fmt: skip
