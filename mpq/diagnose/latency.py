"""Why a file is not faster than float: conversions, small layers, threads, CPU, float layers."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from mpq.cpu import this_cpu
from mpq.diagnose.facts import Facts, Json
from mpq.diagnose.finding import Finding

GAIN = 1.1
"""Times as fast as float, below which nobody would say faster."""
NODE_US = 20.0
"""Microseconds per node of the runtime's graph below which calling it costs as much as it does."""
SMALL = 500_000
"""Multiply-accumulates that take about that long in float on one core."""
BOUNDARIES = 0.15
"""Conversions per node from which on they are many; a file that is all integers has one or two."""


def find(facts: Facts) -> Iterator[Finding]:
    """What explains that the file of the run is no faster than its float file."""
    row, certificate = facts.row("model.onnx"), facts.certificate
    if row is None or row["ratio_to_float"] is None or row["ratio_to_float"] >= GAIN:
        return
    ratio = row["ratio_to_float"]
    speed = f"{ratio:.2f} times as fast as float ({row['latency_ms']['median']:.3f} ms)"
    found: list[Finding] = []
    if certificate is not None:
        found += _boundaries(facts, certificate, speed)
        found += _small(certificate, row, speed)
        found += _float(certificate, speed)
        found += _saturating(certificate, speed)
    found += _threads(row, speed)
    if not found:
        found.append(_unexplained(facts, speed))
    yield from found


def _boundaries(facts: Facts, certificate: Json, speed: str) -> Iterator[Finding]:
    nodes, many = sum(certificate["operators"].values()), certificate["boundaries"]
    if many <= 2 or many < BOUNDARIES * nodes:
        return
    float_ops = sorted(op for op in certificate["operators"] if _is_float(op))
    evidence = (
        f"{speed}; {many} of {nodes} nodes convert between integers and floats, around "
        f"{', '.join(float_ops)}"
    )
    names = tuple(row["name"] for row in certificate["layers"] if not row["integer"])
    gain = ""
    if facts.profile is not None and facts.policy is not None:
        paid = sum(ms for a, b, ms in facts.profile["boundary_ms"] if (a in names) != (b in names))
        gain = f"{paid:.3f} ms of conversions between layers, by profile.json" if paid else ""
    yield Finding(
        "latency",
        names,
        "boundaries between float and integer",
        evidence,
        "replace the float operations by ones with integer kernels (mpq targets), or leave the "
        "layers between two of them in float",
        gain,
    )


def _is_float(op: str) -> bool:
    moves = ("Transpose", "Reshape", "Flatten", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze")
    integer = op.startswith(("QLinear", "QGemm", "Quantize", "Dequantize", "DynamicQuantize"))
    return not integer and "Integer" not in op and op not in (*moves, "MaxPool", "Identity", "Cast")


def _small(certificate: Json, row: Json, speed: str) -> Iterator[Finding]:
    nodes, layers = sum(certificate["operators"].values()), certificate["layers"]
    small = tuple(one["name"] for one in layers if one["macs"] < SMALL)
    each = 1000 * row["latency_ms"]["median"] / max(nodes, 1)
    if each >= NODE_US or len(small) < len(layers) / 2:
        return
    middle = median(one["macs"] for one in layers)
    yield Finding(
        "latency",
        small,
        "small layers: calling a kernel takes as long as its work",
        f"{speed}; {each:.1f} us per node of {nodes}, and {len(small)} of {len(layers)} layers "
        f"have fewer than {SMALL / 1e6:g} million MACs (median {middle:,.0f})",
        "a larger batch (mpq bench --batch 8), or fewer and wider layers; the bytes are saved all "
        "the same",
    )


def _float(certificate: Json, speed: str) -> Iterator[Finding]:
    part = certificate["integer_macs_fraction"]
    names = tuple(row["name"] for row in certificate["layers"] if not row["integer"])
    if part < 0.5:
        yield Finding(
            "latency",
            names,
            "most of the work is done in float",
            f"{speed}; {part:.0%} of the MACs run as integers",
            "what is said of these layers under integers",
        )


def _saturating(certificate: Json, speed: str) -> Iterator[Finding]:
    if this_cpu().saturates or certificate["target"] == "onnxruntime-cpu-avx2":
        yield Finding(
            "latency",
            (),
            "a CPU without VNNI: its integer kernels need three instructions for one",
            f"{speed}; {this_cpu().name}",
            "measure on the CPU that the file is for; mpq doctor says what this one has",
        )


def _threads(row: Json, speed: str) -> Iterator[Finding]:
    if row["threads"] > 1:
        yield Finding(
            "latency",
            (),
            "several threads: an integer kernel has less work to share among them than a float one",
            f"{speed} with {row['threads']} threads, batch {row['batch']}",
            "mpq bench --threads 1 beside it, or a larger --batch",
        )


def _unexplained(facts: Facts, speed: str) -> Finding:
    told = "the certificate shows no cause" if facts.certificate else "there is no certificate"
    return Finding(
        "latency",
        (),
        "a cause that the files of the run do not show",
        f"{speed}; {told}",
        "mpq profile MODEL.pth, which measures each layer as integers and in float",
    )
