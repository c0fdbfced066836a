"""The tables of mpq: each a function from what a stage's JSON file holds to a `Grid`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpq.report.grid import Grid, columns, fixed, short, tiny

Json = Mapping[str, Any]
PARTS = {"weight": "W", "activation": "A"}
EXACT_DB = 999.0
"""What `verify.json` holds where there is no difference at all: JSON has no infinity."""


def bench_table(rows: Sequence[Json]) -> Grid:
    """Model files side by side: `rows` are the lines of `bench.jsonl`."""
    heads = columns("file", "#bytes", "#top-1", "#ms", "?#p10..p90", "#speed", "#MB")
    body = [
        (
            row["file"],
            f"{row['bytes']:,}",
            fixed(row["top1"], 2),
            fixed(row["latency_ms"]["median"], 3),
            f"{row['latency_ms']['p10']:.2f}..{row['latency_ms']['p90']:.2f}",
            "-" if row["ratio_to_float"] is None else f"{row['ratio_to_float']:.2f}x",
            fixed(row["peak_mb"], 0),
        )
        for row in rows
    ]
    return Grid("Model files side by side", heads, tuple(body), _bench_note(rows))


def _bench_note(rows: Sequence[Json]) -> str:
    images = ", ".join(f"{n:,}" for n in sorted({r["n"] for r in rows}) if n)
    threads = ", ".join(str(t) for t in sorted({r["threads"] for r in rows}))
    batch = ", ".join(str(b) for b in sorted({r["batch"] for r in rows}))
    accuracy = f"top-1 in percent of {images} images; " if images else ""
    return (
        f"{accuracy}ms per batch of {batch}, threads: {threads}; "
        f"speed: median over rounds of float/this; MB: peak memory of a process of its own"
    )


def demo_table(rows: Sequence[Json]) -> Grid:
    """Configurations: `rows` have name, top1, bytes, ratio, agreement and integer (or None)."""
    heads = columns("configuration", "#top-1", "#bytes", "#speed", "#agreement", "#integer")
    body = [
        (
            row["name"],
            fixed(row["top1"], 2),
            f"{row['bytes']:,}",
            f"{row['ratio']:.2f}x",
            "-" if row["agreement"] is None else f"{row['agreement']:.2%}",
            "-" if row["integer"] is None else f"{row['integer']:.1%}",
        )
        for row in rows
    ]
    note = (
        "top-1, bytes and speed (float/this, one thread, batch 1) are the file's in onnxruntime; "
        "agreement: same class as the simulation; integer: share of MACs in integer kernels"
    )
    return Grid("Configurations", heads, tuple(body), note)


def ensemble_table(rows: Sequence[Json]) -> Grid:
    """Teachers: `rows` have name, arch, normalize and top1 (percent); the last is the whole."""
    heads = columns("teacher", "architecture", "?normalization", "#top-1")
    body = [(row["name"], row["arch"], row["normalize"], fixed(row["top1"], 2)) for row in rows]
    return Grid("Teachers", heads, tuple(body))


def sensitivity_table(sensitivity: Json) -> Grid:
    """Every layer with its score at each candidate width, and the widths that were chosen."""
    scores = {(r["layer"], r["part"], r["bits"]): r["score"] for r in sensitivity["rows"]}
    widths = sorted(
        {(part, bits) for _, part, bits in scores}, key=lambda k: (k[0] != "weight", -k[1])
    )
    heads = columns("layer", "?kind", "?#params", "?#MACs")
    heads += columns(*(f"#{PARTS[part]}{bits}" for part, bits in widths), "#bits")
    chosen = sensitivity.get("chosen") or {}
    body = [
        (
            layer["name"],
            layer["kind"],
            short(layer["params"]),
            short(layer["macs"]),
            *(tiny(scores.get((layer["name"], part, bits))) for part, bits in widths),
            widths_text(chosen.get(layer["name"])),
        )
        for layer in sensitivity["layers"]
    ]
    note = f"score: {sensitivity['metric']} on {sensitivity['samples']} images; higher hurts more"
    return Grid("Sensitivity of each layer", heads, tuple(body), note)


def widths_text(widths: Sequence[int | None] | None) -> str:
    """`W4A8` of `[4, 8]`, `float` where a width is None, `-` where nothing was decided."""
    if widths is None:
        return "-"
    if None in widths:
        return "float"
    return f"W{widths[0]}A{widths[1]}"


def configurations_table(sensitivity: Json, limit: int = 12) -> Grid:
    """The Pareto front as a table, thinned evenly to `limit` rows; the chosen one stands out."""
    front = sorted(sensitivity["front"], key=lambda c: c["effective_bits"])
    picked = chosen_index(sensitivity, front)
    kept = _thin(len(front), limit, picked)
    bits = sorted({w[0] for c in front for w in c["widths"].values() if w[0]}, reverse=True)
    heads = columns("#bits", "#bytes", "#BitOps", "#drop", *(f"#W{b}" for b in bits), "")
    body = []
    for i in kept:
        counts = Counter(w[0] for w in front[i]["widths"].values())
        body.append(
            (
                fixed(front[i]["effective_bits"], 2),
                f"{front[i]['bytes']:,}",
                short(front[i]["bitops"]),
                tiny(front[i]["predicted_drop"]),
                *(str(counts[b]) for b in bits),
                "chosen" if i == picked else "",
            )
        )
    marked = frozenset(kept.index(i) for i in kept if i == picked)
    note = f"{len(kept)} of {len(front)} configurations; W8: layers with 8-bit weights"
    return Grid("Configurations on the Pareto front", heads, tuple(body), note, marked)


def chosen_index(sensitivity: Json, front: Sequence[Json]) -> int | None:
    """Which entry of `front` has the widths of `chosen`; None where none has."""
    chosen = {k: list(v) for k, v in (sensitivity.get("chosen") or {}).items()}
    for i, configuration in enumerate(front):
        if chosen and {k: list(v) for k, v in configuration["widths"].items()} == chosen:
            return i
    return None


def _thin(count: int, limit: int, always: int | None) -> list[int]:
    if count <= limit:
        return list(range(count))
    kept = {round(i * (count - 1) / (limit - 1)) for i in range(limit)}
    return sorted(kept | ({always} if always is not None else set()))


def certificate_table(certificate: Json) -> Grid:
    """What each layer was asked to be, is stored as, and is executed as."""
    heads = columns("layer", "asked", "stored", "executed", "reason")
    keys = ("name", "asked", "stored", "executed", "reason")
    body = [tuple(str(layer[k] or "") for k in keys) for layer in certificate["layers"]]
    note = (
        f"{certificate['integer_macs_fraction']:.1%} of the MACs run as integers; "
        f"{certificate['boundaries']} boundaries between integer and float"
    )
    return Grid("What runs as integers", heads, tuple(body), note)


def verify_table(verify: Json) -> Grid:
    """How far the runtime's answers are from the simulation, layer by layer."""
    heads = columns("layer", "#SQNR dB", "#largest step", "#equal")
    body = [
        (
            layer["name"],
            "exact" if layer["sqnr_db"] >= EXACT_DB else fixed(layer["sqnr_db"], 1),
            short(layer["max_step"]),
            "-" if layer["equal_fraction"] is None else f"{layer['equal_fraction']:.3%}",
        )
        for layer in verify["layers"]
    ]
    note = (
        f"top-1 agreement {verify['top1_agreement']:.2%} on {verify['n']} images, "
        f"largest difference {short(verify['max_step'])} steps"
    )
    return Grid("Runtime against simulation", heads, tuple(body), note)
