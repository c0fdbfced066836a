"""The tables of what was trained: the demo's configurations, and teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpq.noise import margin
from mpq.report.grid import Grid, columns, fixed
from mpq.report.words import distilled

Json = Mapping[str, Any]


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
        f"top-1 in percent of {rows[0]['n']:,} test images; bytes and speed (float/this, one "
        "thread, batch 1) are the file's in onnxruntime; agreement: same class as the simulation; "
        f"integer: share of MACs in integer kernels; {distilled(rows)}"
    )
    return Grid("Configurations", heads, tuple(body), note)


def ensemble_table(rows: Sequence[Json], images: int) -> Grid:
    """Teachers: `rows` have name, arch, normalize and top1 (percent); the last is the whole."""
    heads = columns("teacher", "architecture", "?normalization", "#top-1")
    body = [(row["name"], row["arch"], row["normalize"], fixed(row["top1"], 2)) for row in rows]
    note = (
        f"top-1 in percent of {images:,} validation images; chance explains "
        f"{margin(rows[-1]['top1'], rows[0]['top1'], images):.2f} points of a difference"
    )
    return Grid("Teachers", heads, tuple(body), note)
