"""What a budget limits: each as rows over the variables of the search, and as a plain number.

A limit's value is the largest of `rows @ z + fixed`: one row for sums (bits, bytes, BitOps,
milliseconds), one row for each moment of a pass for the peak of activation memory. Milliseconds
have variables of their own after the choices: one for each edge that a conversion may fall on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from mpq.analyze import cost
from mpq.analyze.sensitivity import Sensitivity, by_name
from mpq.latency import LatencyProfile
from mpq.layers import Widths
from mpq.target import Target

Vector = NDArray[np.float64]
Key = tuple[str, Widths]
"""A choice: layer and its widths."""

LIMITS = ("effective_bits", "max_size_mb", "max_bops", "max_activation_mb", "max_latency_ms")
"""Budgets that follow from the widths alone, as the policy file names them."""


@dataclass(frozen=True)
class Limit:
    """One quantity that a budget may limit.

    Args:
        name: as in `LIMITS`.
        rows: `[k, variables]`.
        fixed: `[k]`, what is there whatever the choices.
        unit: what one unit of the budget is in units of the rows.
        measure: the exact value of a configuration, in units of the budget.
    """

    name: str
    rows: csr_array
    fixed: Vector
    unit: float
    measure: Callable[[Mapping[str, Widths]], float]


def limits(
    sensitivity: Sensitivity, keys: Sequence[Key], target: Target, profile: LatencyProfile | None
) -> dict[str, Limit]:
    """All limits that apply, by name.

    Args:
        sensitivity: layers and live sets.
        keys: the choices, in the order of the variables; edges of `profile` come after them.
        target: what a layer costs in the file.
        profile: measured times, if there are any.
    """
    layers, infos = sensitivity.layers, by_name(sensitivity.layers)
    besides = sensitivity.besides
    edges = len(profile.boundary_ms) if profile else 0
    of = [(infos[name], pair) for name, pair in keys]

    def linear(
        name: str,
        values: Sequence[float],
        unit: float,
        measure: Callable[[Mapping[str, Widths]], float],
        fixed: float = 0.0,
    ) -> Limit:
        row = np.array([*values, *[0.0] * edges], dtype=np.float64)
        return Limit(name, csr_array(row[None]), np.array([fixed]), unit, measure)

    found = [
        linear(
            "effective_bits",
            [float(i.params * (p[0] or 32)) for i, p in of],
            float(sum(layer.params for layer in layers)),
            lambda w: cost.effective_bits(layers, w),
        ),
        linear(
            "max_size_mb",
            [float(cost.layer_bytes(i, p[0], target)) for i, p in of],
            1e6,
            lambda w: cost.predicted_bytes(layers, w, target, besides) / 1e6,
            float(cost.fixed_bytes(besides, target, [p[0] for _, p in of])),  # whatever it takes
        ),
        linear(
            "max_bops",
            [i.bitops(*p) for i, p in of],
            1e9,
            lambda w: cost.bitops(layers, w, besides) / 1e9,
            cost.bitops((), {}, besides),
        ),
    ]
    if sensitivity.live_sets:
        found.append(_activation(sensitivity, keys, edges))
    if profile:
        found.append(_latency(sensitivity, keys, target, profile))
    return {limit.name: limit for limit in found}


def places_of(keys: Sequence[Key]) -> dict[str, list[int]]:
    """The variables of each layer."""
    places: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(keys):
        places.setdefault(name, []).append(index)
    return places


def _activation(sensitivity: Sensitivity, keys: Sequence[Key], edges: int) -> Limit:
    """Bits alive at each moment."""
    places = places_of(keys)
    entries = [
        (count * (keys[index][1][1] or 32), row, index)
        for row, held in enumerate(sensitivity.live_sets)
        for name, count in held.layers
        for index in places[name]
    ]
    shape = (len(sensitivity.live_sets), len(keys) + edges)
    fixed = np.array([float(m.fixed) for m in sensitivity.live_sets])
    return Limit(
        "max_activation_mb",
        sparse(entries, shape),
        fixed,
        8e6,
        lambda w: cost.activation_bytes(sensitivity.live_sets, w) / 1e6,
    )


def run_as_integers(
    sensitivity: Sensitivity, keys: Sequence[Key], target: Target
) -> NDArray[np.bool_]:
    """Which of the choices run as integers."""
    infos = by_name(sensitivity.layers)
    return np.array([target.runs_integers(infos[name], *pair) for name, pair in keys], dtype=bool)


def _latency(
    sensitivity: Sensitivity, keys: Sequence[Key], target: Target, profile: LatencyProfile
) -> Limit:
    """Milliseconds: each layer's by how it runs, each edge's where its variable is 1."""
    layers = [
        profile.layers[name].integer_ms if integer else profile.layers[name].float_ms
        for (name, _), integer in zip(keys, run_as_integers(sensitivity, keys, target), strict=True)
    ]
    row = np.array([*layers, *profile.boundary_ms.values()])
    base = np.array([profile.base_ms])
    return Limit(
        "max_latency_ms",
        csr_array(row[None]),
        base,
        1.0,
        lambda w: profile.predict(target.integers(sensitivity.layers, w)),
    )


def conversions(
    keys: Sequence[Key], integer: NDArray[np.bool_], profile: LatencyProfile
) -> tuple[csr_array, Vector]:
    """Rows that make the variable of an edge 1 where exactly one end runs as integers.

    With `I` the sum of a layer's integer choices, for the edge from u to v:
    `I_u - I_v <= y`, `I_v - I_u <= y`, `y <= I_u + I_v`, `y <= 2 - I_u - I_v`.
    """
    places = {n: [i for i in own if integer[i]] for n, own in places_of(keys).items()}
    entries: list[tuple[float, int, int]] = []
    limit: list[float] = []
    for edge, (u, v) in enumerate(profile.boundary_ms):
        for sign_u, sign_v, sign_y, right in (
            (1, -1, -1, 0),
            (-1, 1, -1, 0),
            (-1, -1, 1, 0),
            (1, 1, 1, 2),
        ):
            row = len(limit)
            entries += [(float(sign_u), row, i) for i in places.get(u, ())]
            entries += [(float(sign_v), row, i) for i in places.get(v, ())]
            entries.append((float(sign_y), row, len(keys) + edge))
            limit.append(float(right))
    return sparse(entries, (len(limit), len(keys) + len(profile.boundary_ms))), np.array(limit)


def sparse(entries: Sequence[tuple[float, int, int]], shape: tuple[int, int]) -> csr_array:
    """A sparse matrix from (value, row, column); entries of one place add up."""
    values, rows, columns = zip(*entries, strict=True) if entries else ((), (), ())
    places = (np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64))
    return coo_array((np.array(values, dtype=np.float64), places), shape=shape).tocsr()
