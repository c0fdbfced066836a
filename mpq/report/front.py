"""The front to pick from: every configuration with its policy file, word for word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpq.entries import entries
from mpq.layers import weight_bytes
from mpq.policy import Constraints, Policy, SearchResult
from mpq.report.grid import fixed, short, tiny
from mpq.report.tables import chosen_indices, swept, widths_text

Json = Mapping[str, Any]


def picked(sensitivity: Json, base: Policy, folder: Path) -> dict[str, Any]:
    """What the page's script needs: the points in the order of `swept`, and their files' lines.

    Lines that many policies have in common are kept once, so that fronts of large networks stay
    small: `points[i].lines` are indices into `lines`.

    Args:
        sensitivity: the content of `sensitivity.json`.
        base: the policy of the run, which says all that the front does not.
        folder: the run, where the files of the chosen points are.
    """
    front = swept(sensitivity)
    chosen = chosen_indices(sensitivity, front)
    params = {layer["name"]: layer["params"] for layer in sensitivity["layers"]}
    numbers: dict[str, int] = {}
    points = []
    for i, point in enumerate(front):
        file = folder / chosen.get(i, "").split(", ")[0].replace("chosen", "policy.yaml")
        text = (
            file.read_text(encoding="utf-8") if file.is_file() else policy_of(point, base, params)
        )
        lines = [numbers.setdefault(line, len(numbers)) for line in text.splitlines()]
        widths = [widths_text(pair) for pair in point["widths"].values()]
        points.append({**_told(point, chosen.get(i, "")), "widths": widths, "lines": lines})
    names = list(front[0]["widths"]) if front else []
    first = (i for i, name in chosen.items() if name.split(", ")[0] in ("chosen", "policy.yaml"))
    start = next(first, min(chosen, default=0))
    return {"layers": names, "points": points, "lines": list(numbers), "picked": start}


def _told(point: Json, name: str) -> dict[str, Any]:
    facts = {
        "effective bits": fixed(point["effective_bits"], 2),
        "bytes": f"{point['bytes']:,}",
        "BitOps": short(point["bitops"]),
        "predicted drop": tiny(point["predicted_drop"]),
    }
    file = name.split(", ")[0] if name and name != "chosen" else ""
    default = "policy.yaml" if name else f"policy-{point['effective_bits']:.2f}-bits.yaml"
    return {"facts": facts, "chosen": name, "file": file or default}


def policy_of(point: Json, base: Policy, params: Mapping[str, int]) -> str:
    """The policy file of a point of the front; what is not searched is as in `base`.

    Args:
        point: an entry of `front` in `sensitivity.json`.
        base: the policy of the run.
        params: number of weights of each layer.
    """
    widths = {name: (pair[0], pair[1]) for name, pair in point["widths"].items()}
    result = SearchResult(
        effective_bits=round(point["effective_bits"], 4),
        weight_bytes=sum(weight_bytes(params[name], pair[0]) for name, pair in widths.items()),
        predicted_bytes=point["bytes"],
        bitops=point["bitops"],
        activation_bytes=point.get("activation_bytes"),
        latency_ms=point.get("latency_ms"),
        predicted_drop=point["predicted_drop"],
    )
    found = base.replace(
        layers=tuple(entries(widths, base, {})),
        constraints=Constraints(),
        result=result,
        evidence={},
    )
    return found.to_yaml()
