"""What stands on top of the page: the network against float and against peers, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq import origins
from mpq.noise import interval, margin
from mpq.report.contents import Contents
from mpq.report.grid import TOP1, Grid, agreement_text, columns, counted
from mpq.report.render import Head
from mpq.report.tables import bench_table

Json = Mapping[str, Any]
Fact = tuple[str, str, str]
PEERS = {
    "ort-static.onnx": "onnxruntime static int8",
    "ort-dynamic.onnx": "onnxruntime dynamic int8",
}
"""Files that `mpq bench --peers` makes of the float model, and whose work they are."""
NAMES = {"float.onnx": "float", "model.onnx": "mpq", **PEERS}


def head(run: Contents) -> Head:
    """The head of a run's page, of what there is."""
    policy = run.policy
    model = policy.model if policy else None
    title = f"{model.arch} on {policy.data.name}" if policy and model else run.name
    if policy and model and policy.data.name == "none":
        title = model.arch
    rows = measured(run)
    made_of = f" \N{MIDDLE DOT} model.onnx is made of {run.made_of}" if run.made_of else ""
    eyebrow = f"mpq report \N{MIDDLE DOT} run {run.name}{made_of}"
    return Head(title, eyebrow, _headline(run, rows), against_peers(rows), facts(run, rows))


def measured(run: Contents) -> Sequence[Json]:
    """The lines of `bench.jsonl`, if they are of the run's own file."""
    own = origins.is_of(run.folder / "bench.jsonl", "model.onnx")
    return (run.read("bench.jsonl", list) if own else None) or []


def named_short(file: str) -> str:
    """A file's name in a plot: `mpq`, `float`, `ORT static int8`."""
    path = Path(file)
    return NAMES.get(path.name, path.stem).replace("onnxruntime", "ORT")


def named(rows: Sequence[Json], name: str) -> Json | None:
    """The line of a file by its name."""
    return next((row for row in rows if Path(row["file"]).name == name), None)


def _headline(run: Contents, rows: Sequence[Json]) -> str:
    model, plain = named(rows, "model.onnx"), named(rows, "float.onnx")
    if model is not None:
        return compared(model, plain)
    if run.path("model.onnx"):
        return f"Exported, and not measured beside float yet: mpq bench {run.folder}/model.onnx"
    result = run.policy.result if run.policy else None
    if result is None:
        return ""
    return (
        f"A policy of {result.effective_bits:.2f} effective weight bits, for a file of about "
        f"{result.predicted_bytes / 1e3:,.0f} kB. Nothing is exported yet."
    )


def compared(model: Json, plain: Json | None) -> str:
    """Size, speed and accuracy beside the float model's, on the same images."""
    told = [f"{model['bytes'] / 1e3:,.0f} kB"]
    if plain is not None:
        told[0] += f", {plain['bytes'] / model['bytes']:.1f} times smaller than float"
    if model["ratio_to_float"] is not None:
        told.append(f"{model['ratio_to_float']:.2f} times as fast")
    if "metric" in model:
        told.append(f"{model['metric']} {model['value']:.4g}{_float_value(plain)}")
    if model["top1"] is None:
        return ", ".join(told) + "."
    text = f"top-1 {model['top1']:.2f} %"
    if plain is not None and plain["top1"] is not None:
        lost, noise = (
            plain["top1"] - model["top1"],
            margin(plain["top1"], model["top1"], model["n"]),
        )
        alike = ", a difference within chance" if abs(lost) <= noise and lost else ""
        text += f" against {plain['top1']:.2f} % in float{alike}"
    return f"{', '.join(told)}; {text}, on {counted(model['n'], 'image')}."


def _float_value(plain: Json | None) -> str:
    """What the float model has by the metric that was asked for."""
    known = plain is not None and "metric" in plain
    return f" against {plain['value']:.4g} in float" if plain and known else ""


def against_peers(rows: Sequence[Json]) -> str:
    """The file beside each peer that was measured on the same images; empty without any."""
    model, told = named(rows, "model.onnx"), []
    for file, name in PEERS.items():
        peer = named(rows, file)
        if model is None or peer is None:
            continue
        top1 = "" if peer["top1"] is None else f", top-1 {peer['top1']:.2f} %"
        size = f"{model['bytes'] / peer['bytes']:.0%} of its size"
        told.append(f"{name} ({peer['bytes'] / 1e3:,.0f} kB{top1}): {size}")
    return f"Against {'; against '.join(told)}." if told else ""


def facts(run: Contents, rows: Sequence[Json]) -> list[Fact]:
    """The figures that matter, as label, value and note."""
    found = _bench_facts(rows)
    policy = run.policy
    if policy and policy.result:
        bits = f"{policy.result.effective_bits:.2f}"
        size = f"file of about {policy.result.predicted_bytes / 1e3:,.0f} kB"
        found.append(("effective weight bits", bits, "" if rows else size))
    found += run.read("certificate.json", _certificate_facts) or []
    found += run.read("verify.json", _verify_facts) or []
    return found


def _bench_facts(rows: Sequence[Json]) -> list[Fact]:
    model, plain = named(rows, "model.onnx"), named(rows, "float.onnx")
    if model is None:
        return []
    found = []
    if model["top1"] is not None:
        low, high = interval(model["top1"], model["n"])
        note = f"95 %: {low:.2f} to {high:.2f}, {counted(model['n'], 'image')}"
        if plain is not None and plain["top1"] is not None:
            note = f"float {plain['top1']:.2f} %; {note}"
        found.append(("top-1", f"{model['top1']:.2f} %", note))
    if "metric" in model:
        lost = model.get("lost")
        note = "" if not lost else f"lost, 95 %: {lost['low']:.3g} to {lost['high']:.3g}"
        found.append((model["metric"], f"{model['value']:.4g}", note))
    smaller = "" if plain is None else (
        f"{plain['bytes'] / model['bytes']:.1f} times smaller than float"
    )  # fmt: skip
    found.append(("size of the file", f"{model['bytes'] / 1e3:,.1f} kB", smaller))
    if model["ratio_to_float"] is not None:
        speed = f"{model['latency_ms']['median']:.3g} ms, {counted(model['threads'], 'thread')}"
        found.append(
            ("speed", f"{model['ratio_to_float']:.2f}\N{MULTIPLICATION SIGN} float", speed)
        )
    return found


def _certificate_facts(certificate: Json) -> list[Fact]:
    walls = counted(certificate["boundaries"], "boundary", "boundaries")
    share = f"{certificate['integer_macs_fraction']:.1%}"
    return [("MACs that run as integers", share, f"{walls} between integer and float")]


def _verify_facts(verify: Json) -> list[Fact]:
    text = agreement_text(verify)
    if text.startswith(TOP1):
        alike = text.removeprefix(TOP1)
        return [("same class as the simulation", alike, counted(verify["n"], "image"))]
    return [("against the simulation", text, counted(verify["n"], "input"))]


def results_table(rows: Sequence[Json]) -> Grid:
    """`bench_table` with intervals, sizes beside float, and what the files are."""
    plain, grid, body = named(rows, "float.onnx"), bench_table(rows), []
    for row, cells in zip(rows, grid.rows, strict=True):
        span = None if row["top1"] is None else interval(row["top1"], row["n"])
        told = "-" if span is None else f"{span[0]:.2f}..{span[1]:.2f}"
        size = "-" if plain is None else f"{row['bytes'] / plain['bytes']:.1%}"
        name = str(NAMES.get(Path(row["file"]).name, row["file"]))
        body.append((name, *cells[1:], told, size))
    heads = (*grid.columns, *columns("#top-1, 95 %", "#size of float"))
    marked = frozenset(i for i, r in enumerate(rows) if Path(r["file"]).name == "model.onnx")
    return Grid(grid.title, heads, tuple(body), grid.note, marked)
