"""The tables of mpq: each a function from what a stage's JSON file holds to a `Grid`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpq.diagnose.facts import score_unit
from mpq.report.grid import TOP1, Grid, agreement_text, columns, counted, fixed, short, tiny
from mpq.report.words import chance, decibels, meaning

Json = Mapping[str, Any]
PARTS = {"weight": "W", "activation": "A"}


def bench_table(rows: Sequence[Json]) -> Grid:
    """Model files side by side: `rows` are the lines of `bench.jsonl`."""
    metric = next((row["metric"] for row in rows if "metric" in row), None)
    compared = any("agreement" in row for row in rows)
    judged = {"agreement": 2, "sqnr_db": 1} if compared else {"top1": 2}
    named = ("#agreement", "#dB") if compared else ("#top-1",)
    besides = () if metric is None else (f"#{metric}", "?#lost, 95 %")
    heads = columns("file", "#bytes", *named, *besides, "#ms", "?#p10..p90", "#speed", "#MB")
    body = [
        (
            row["file"],
            f"{row['bytes']:,}",
            *(fixed(row.get(key), places) for key, places in judged.items()),
            *(() if metric is None else _judged(row)),
            fixed(row["latency_ms"]["median"], 3),
            f"{row['latency_ms']['p10']:.2f}..{row['latency_ms']['p90']:.2f}",
            "-" if row["ratio_to_float"] is None else f"{row['ratio_to_float']:.2f}x",
            fixed(row["peak_mb"], 0),
        )
        for row in rows
    ]
    return Grid("Model files side by side", heads, tuple(body), _bench_note(rows))


def _judged(row: Json) -> tuple[str, str]:
    """What a metric gives, and what of it is lost against the first file."""
    lost = row.get("lost")
    interval = "-" if lost is None else f"{lost['low']:.3g}..{lost['high']:.3g}"
    return f"{row['value']:.4g}", interval


def _bench_note(rows: Sequence[Json]) -> str:
    images = ", ".join(f"{n:,}" for n in sorted({r["n"] for r in rows}) if n)
    threads = ", ".join(str(t) for t in sorted({r["threads"] for r in rows}))
    batch = ", ".join(str(b) for b in sorted({r["batch"] for r in rows}))
    accuracy = f"top-1 in percent of {images} images, {chance(rows)}; " if images else ""
    if compared := max((r.get("compared", 0) for r in rows), default=0):
        accuracy = (f"agreement in percent, and dB, with the answers of the float file to "
                    f"{compared:,} samples; ")  # fmt: skip
    return (
        f"{accuracy}ms per batch of {batch}, threads: {threads}; "
        f"speed: median over rounds of float/this; MB: peak memory of a process of its own"
    )


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
    metric, images = sensitivity["metric"], sensitivity["samples"]
    note = f"score: {metric} on {images} images, in {score_unit(metric)}; higher hurts more"
    return Grid("Sensitivity of each layer", heads, tuple(body), note)


def widths_text(widths: Sequence[int | None] | None) -> str:
    """`W4A8` of `[4, 8]`, `float` where a width is None, `-` where nothing was decided."""
    if widths is None:
        return "-"
    if None in widths:
        return "float"
    return f"W{widths[0]}A{widths[1]}"


def configurations_table(sensitivity: Json, limit: int = 12) -> Grid:
    """The Pareto front as a table, thinned evenly to `limit` rows; those chosen stand out."""
    front = swept(sensitivity)
    picked = chosen_indices(sensitivity, front)
    kept = _thin(len(front), limit, list(picked))
    bits = sorted({w[0] for c in front for w in c["widths"].values() if w[0]}, reverse=True)
    more = [k for k in _SPARE if any(c.get(k) is not None for c in front)]
    heads = columns("#bits", "#bytes", "#BitOps", *(_SPARE[k][0] for k in more), "#drop")
    heads += columns(*(f"#W{b}" for b in bits), "")
    body = []
    for i in kept:
        counts = Counter(w[0] for w in front[i]["widths"].values())
        body.append(
            (
                fixed(front[i]["effective_bits"], 2),
                f"{front[i]['bytes']:,}",
                short(front[i]["bitops"]),
                *(_SPARE[k][1](front[i].get(k)) for k in more),
                tiny(front[i]["predicted_drop"]),
                *(str(counts[b]) for b in bits),
                picked.get(i, ""),
            )
        )
    marked = frozenset(kept.index(i) for i in kept if i in picked)
    note = f"{len(kept)} of {len(front)} configurations; drop in {meaning(sensitivity['metric'])}"
    if bits:
        note += f"; W{bits[0]}: layers with {bits[0]}-bit weights"
    return Grid("Configurations on the Pareto front", heads, tuple(body), note, marked)


SWEEPS = {
    "effective_bits": ("effective_bits", "effective weight bits", 1.0),
    "max_size_mb": ("bytes", "bytes of the file, MB", 1e6),
    "max_bops": ("bitops", "BitOps per image, 10^9", 1e9),
    "max_activation_mb": ("activation_bytes", "activations alive at one time, MB", 1e6),
    "max_latency_ms": ("latency_ms", "latency, ms", 1.0),
}
"""What a front may be over: key of its entries, words, and unit."""


def swept(sensitivity: Json) -> list[Json]:
    """The front by rising value of what it is over."""
    key = SWEEPS[sensitivity.get("sweep", "effective_bits")][0]
    return sorted(sensitivity["front"], key=lambda c: (c[key], -c["predicted_drop"]))


_SPARE: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "activation_bytes": ("?#activations", short),
    "latency_ms": ("?#ms", lambda value: fixed(value, 3)),
}


def chosen_indices(sensitivity: Json, front: Sequence[Json]) -> dict[int, str]:
    """Which entries of `front` were chosen, and what they are called: the file, or `chosen`."""
    choices = sensitivity.get("choices") or []
    names = [c["file"] for c in choices] if len(choices) > 1 else ["chosen"]
    wanted = [c["widths"] for c in choices] or [sensitivity.get("chosen") or {}]
    found: dict[int, str] = {}
    for name, widths in zip(names, wanted, strict=True):
        goal = {k: list(v) for k, v in widths.items()}
        for i, configuration in enumerate(front):
            if goal and {k: list(v) for k, v in configuration["widths"].items()} == goal:
                found[i] = f"{found[i]}, {name}" if i in found else name
                break
    return found


def validation_table(validation: Json, limit: int = 12) -> Grid:
    """Random configurations by rising divergence, thinned evenly to `limit` rows."""
    policies = sorted(validation["policies"], key=lambda p: p["kl"])
    heads = columns("#bits", "#predicted drop", "#measured divergence", "#loss", "#top-1")
    body = [
        (
            fixed(policies[i]["effective_bits"], 2),
            tiny(policies[i]["predicted"]),
            tiny(policies[i]["kl"]),
            tiny(policies[i]["loss"]),
            fixed(policies[i]["top1"], 2),
        )
        for i in _thin(len(policies), limit, [])
    ]
    note = (
        f"Spearman's rho of prediction and divergence {fixed(validation['rho'], 3)}, and increase "
        f"of the loss {fixed(validation['rho_loss'], 3)}, over {len(policies)} random policies on "
        f"{validation['images']} images that were not scored; predicted in "
        f"{score_unit(validation['metric'])}, divergence and loss in nats, top-1 in percent"
    )
    return Grid("Scores against measurements", heads, tuple(body), note)


def diff_table(rows: Sequence[Json], total: Json, names: tuple[str, str]) -> Grid:
    """Two policies layer by layer: `rows` and `total` as of `mpq.compare.compare`."""
    heads = columns("layer", "#a", "#b", "#bytes", "?#BitOps", "?#drop", "?reason in b")
    body: list[tuple[str, ...]] = [
        (
            row["layer"],
            widths_text(row["a"]),
            widths_text(row["b"]),
            signed(row["bytes"]),
            signed(row["bitops"]),
            "-" if row["drop"] is None else f"{row['drop']:+.2e}",
            row["reason"],
        )
        for row in rows
    ]
    if rows:
        bits = [fixed(total[k], 2) for k in ("effective_bits_a", "effective_bits_b")]
        drop = "-" if total["drop"] is None else f"{total['drop']:+.2e}"
        sums = (signed(total["bytes"]), signed(total["bitops"]), drop, "effective weight bits")
        body.append(("all layers", *bits, *sums))
    note = (
        f"a: {names[0]}, b: {names[1]}; {len(rows)} of {total['layers']} layers differ; bytes of "
        "weights, BitOps and predicted drop (nats by the default metric): b less a"
    )
    return Grid("Difference of two policies", heads, tuple(body), note, frozenset({len(rows)}))


def signed(value: float | None) -> str:
    """A difference with its sign: `+18.4k`, `-512`, `0`."""
    if value is None:
        return "-"
    return f"{'+' if value > 0 else ''}{short(value)}"


def _thin(count: int, limit: int, always: Sequence[int]) -> list[int]:
    if count <= limit:
        return list(range(count))
    kept = {round(i * (count - 1) / (limit - 1)) for i in range(limit)}
    return sorted(kept | set(always))


def certificate_table(certificate: Json) -> Grid:
    """What each layer was asked to be, is stored as, and is executed as."""
    heads = columns("layer", "asked", "stored", "executed", "reason")
    keys = ("name", "asked", "stored", "executed", "reason")
    body = [tuple(str(layer[k] or "") for k in keys) for layer in certificate["layers"]]
    body += [
        (part["name"], "-", "FLOAT", part["kind"], part["reason"])
        for part in certificate.get("besides", ())
        if part["macs"]
    ]
    note = (
        f"{certificate['integer_macs_fraction']:.1%} of the MACs run as integers; "
        f"{counted(certificate['boundaries'], 'boundary', 'boundaries')} between integer and float"
    )
    return Grid("What runs as integers", heads, tuple(body), note)


def verify_table(verify: Json) -> Grid:
    """How far the runtime's answers are from the simulation, layer by layer."""
    heads = columns("layer", "#SQNR dB", "#steps alone", "#largest step", "#equal")
    body = [
        (
            layer["name"],
            decibels(layer["sqnr_db"]),
            short(layer["own_step"]) if "own_step" in layer else "-",
            short(layer["max_step"]),
            "-" if layer["equal_fraction"] is None else f"{layer['equal_fraction']:.3%}",
        )
        for layer in verify["layers"]
    ]
    note = (
        f"{agreement_text(verify)} on {verify['n']} images, "
        f"largest difference {short(verify['max_step'])} steps"
    )
    for one in (verify, *verify.get("elsewhere", ())):
        if one.get("judged_by") == "reference":
            alike = agreement_text(one).removeprefix(TOP1)
            note += f"; {one['target']} by its integer reference: {alike} on {one['n']} images"
    return Grid("Runtime against simulation", heads, tuple(body), note)


def portability_table(found: Json) -> Grid:
    """A file in every runtime: `found` is `portability.json`."""
    heads = columns(
        *("runtime", "?version", "#integer layers", "#predicted", "#same class", "?#top-1"),
        *("?#SQNR dB", "#ms", "#speed", "note"),
    )
    body = [
        (
            row["runtime"],
            row["version"] or "-",
            "-" if row["integer"] is None else f"{row['integer']} of {row['layers']}",
            *(
                "-" if row[key] is None else f"{row[key]} of {row['n']}"
                for key in ("predicted", "same_class")
            ),
            fixed(row["top1"], 2),
            decibels(row.get("sqnr_db")),
            fixed(row["ms"], 3),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
            # The command that installs it is long and stands below.
            "not installed" if row["install"] else row["problem"],
        )
        for row in found["rows"]
    ]
    installs = dict.fromkeys(row["install"] for row in found["rows"] if row["install"])
    note = (
        "predicted: images whose logits equal the integer reference of that CPU in every bit; same "
        "class, SQNR: as the reference of x86, and against it; top-1 in percent of these images; "
        "speed: float/this in the same runtime, of one image on one thread; emulated CPUs have none"
    )
    note += f"; to install: {', '.join(installs)}" if installs else ""
    return Grid(f"{found['file']} in other runtimes", heads, tuple(body), note)


def exact_table(exact: Json) -> Grid:
    """The integer reference, op type by op type: `exact` is `exact.json`; what differs by name."""
    heads = columns("operator", "#nodes", "#tensors equal", "#values", "#differ", "#steps", "note")
    groups: dict[tuple[str, str], list[Json]] = {}
    for node in exact["nodes"]:
        different = f": {node['name']}" if node["mismatches"] else ""
        groups.setdefault((node["op"] + different, node["reason"]), []).append(node)
    body = [
        (
            op,
            str(len(nodes)),
            "-" if reason else str(sum(not n["mismatches"] for n in nodes)),
            f"{sum(n['elements'] for n in nodes):,}",
            "-" if reason else f"{sum(n['mismatches'] for n in nodes):,}",
            "-" if reason else f"{max(n['max_step'] for n in nodes):g}",
            f"not predicted: {reason}" if reason else "",
        )
        for (op, reason), nodes in groups.items()
    ]
    note = (
        f"{'every' if exact['exact'] else 'NOT every'} predicted tensor equals onnxruntime "
        f"{exact['runtime']}'s in every bit, on {exact['n']} images"
    )
    return Grid("Integer reference", heads, tuple(body), note)
