"""What layers do to each other: pairwise terms, inside blocks, from the Fisher forms.

The errors of two layers add up in the answers or cancel. With `u_i(l, b)` of `fisher`, `U'U / 2N`
holds every pair of candidates; its diagonal is the block-form score. Like CLADO (Z. Deng et al.,
"Mixed-Precision Quantization with Cross-Layer Dependencies", 2023), but the pairs cost nothing more
than the scores did, and the matrix is positive semidefinite by construction rather than projected.
From a few hundred images the terms of distant layers are mostly noise, so only those inside a block
of the network are kept; leaving out the others keeps the matrix semidefinite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpq.analyze.cost import Widths
from mpq.analyze.sensitivity import PARTS, Sensitivity
from mpq.errors import UsageError

Blocks = Sequence[Sequence[str]]


def blocks(sensitivity: Sensitivity) -> list[list[str]]:
    """Layers by the module that holds them: `layer1.0.conv1` and `layer1.0.conv2` are a block."""
    found: dict[str, list[str]] = {}
    for layer in sensitivity.layers:
        found.setdefault(layer.name.rpartition(".")[0] or layer.name, []).append(layer.name)
    return list(found.values())


def quadratic(
    sensitivity: Sensitivity, inside: Blocks | None
) -> Callable[[Mapping[str, Widths]], float]:
    """A predictor of the loss of a configuration, with interactions.

    Args:
        sensitivity: scores with `pairwise`, as the metrics `fisher` and `gradient` have them.
        inside: layers that may interact, by block; None for all pairs.

    Raises:
        UsageError: the scores have no interactions (they are not kept in the file).
    """
    if sensitivity.pairwise is None:
        raise UsageError(
            "interactions need scores that were made now with the metric fisher: a sensitivity "
            "file does not hold them. Score again."
        )
    matrix = sensitivity.pairwise
    place = {(r.layer, r.part, r.bits): i for i, r in enumerate(sensitivity.rows)}
    groups = inside or [[layer.name for layer in sensitivity.layers]]

    def predict(widths: Mapping[str, Widths]) -> float:
        total = 0.0
        for group in groups:
            chosen = [
                place[name, part, bits]
                for name in group
                for part, bits in zip(PARTS, widths[name], strict=True)
                if bits is not None
            ]
            total += float(matrix[np.ix_(chosen, chosen)].sum())
        return total

    return predict
