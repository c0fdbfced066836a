"""Who judges a file for a target: the runtime at hand where it is of that kind, else the reference.

A file for several targets is judged once for each kind of arithmetic among them. The runtime here
is no judge of a file for CPUs with VNNI if this one has none: its sums saturate, theirs do not.
What OpenVINO computes is not known, so it is only judged by running it (`mpq portability`).
"""

from __future__ import annotations

import logging
from dataclasses import replace

from mpq.calls import Inputs, take
from mpq.graph.ir import QuantGraph
from mpq.target import Target
from mpq.targets import each, this_target

from .pixels import PixelInput
from .reference import Reference
from .verify import VerifyReport, verify

logger = logging.getLogger(__name__)
MACS = 1.6e11
"""Of all images that the reference answers: about a minute on one core."""
LEAST = 16
"""Images that it answers at least."""


def runtime_judges(target: Target) -> bool:
    """Whether the runtime of this computer computes what one of that target does."""
    here = this_target()
    return here.arithmetic == target.arithmetic and (target.saturates or not here.saturates)


def judge(
    qg: QuantGraph,
    model: bytes,
    sites: dict[str, str],
    images: Inputs,
    target: Target,
    pixels: PixelInput | None = None,
) -> VerifyReport:
    """Compare a frozen graph with its file wherever the file is to run.

    Args:
        qg: as of `verify`, like the following.
        model: bytes of the file.
        sites: site name -> name of the value that holds its integers.
        images: normalized; a reference answers the first of them, as many as a minute allows.
        target: where the file is to run.
        pixels: the file takes raw images.

    Raises:
        ExportError: as `verify`.
    """
    reports = [_report(qg, model, sites, images, one, pixels) for one in _distinct(each(target))]
    return replace(reports[0], elsewhere=tuple(reports[1:]))


def _distinct(targets: tuple[Target, ...]) -> list[Target]:
    """One target for each kind of answer, those that the runtime here can judge first.

    With nothing but runtimes whose arithmetic is unknown, onnxruntime stands in for them.
    """
    known = {(t.arithmetic, runtime_judges(t)): t for t in targets if t.arithmetic is not None}
    for one in targets:
        if one.arithmetic is None:
            logger.warning("%s computes in its own way: see it with mpq portability", one.name)
    return sorted(known.values(), key=runtime_judges, reverse=True) or [this_target()]


def _report(
    qg: QuantGraph,
    model: bytes,
    sites: dict[str, str],
    images: Inputs,
    target: Target,
    pixels: PixelInput | None,
) -> VerifyReport:
    reference = None
    if target.arithmetic is not None and not runtime_judges(target):
        macs = sum(layer.macs for layer in qg.layers.values())
        images = take(images, slice(max(LEAST, int(MACS / max(macs, 1)))))
        reference = Reference(target.arithmetic)
    found = verify(qg, model, sites, images, pixels=pixels, reference=reference)
    return replace(found, target=target.name)
