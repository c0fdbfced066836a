"""How near the answers of model files are to those of the float file, each output by its kind.

Any files, any outputs, no labels: choices must agree, quantities be near in decibels (`Tally`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpq.data import Normalization
from mpq.data.dataset import Samples, length, rows
from mpq.errors import DataError
from mpq.noise import EXACT_DB

from . import runtime
from .feeds import Feed, fixed_batch, takes_images

if TYPE_CHECKING:
    from mpq.outputs import Output, Tally

logger = logging.getLogger(__name__)
Array = NDArray[Any]
MOST = 250
VALUES = 2**24
"""Samples, and values of outputs, that are answered at a time at most."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a file is to the float file.

    Args:
        percent: of equal choices and exact values, of the output that agrees least; None where all
            are quantities.
        sqnr_db: of the quantities, in dB, of the output that is furthest away; None without any.
    """

    percent: float | None = None
    sqnr_db: float | None = None


def feed_of(
    loaded: runtime.Session, samples: Samples, normalize: Normalization | None, path: Path
) -> Feed:
    """Samples as a file takes them.

    Args:
        loaded: its session.
        samples: uint8 images `[n, H, W, C]`, or arrays by name of input.
        normalize: of images, for a file that takes floats.
        path: of the file, for messages.

    Raises:
        DataError: nothing says how images are normalized.
    """
    if not isinstance(samples, np.ndarray):
        return list(samples.values())  # files name their inputs as they like, in this order
    if takes_images(loaded) and runtime.model_input(loaded).integer:
        return samples
    if normalize is None:
        raise DataError(
            f"{path} takes normalized images but does not say how. Name it with "
            f"--normalize imagenet|cifar10|cifar100|none|m,m,m/s,s,s."
        )
    return normalize.apply(samples)


def agreements(
    files: Mapping[Path, Normalization | None],
    reference: Path,
    samples: Samples,
    kinds: Mapping[str, str],
    say: Callable[[str], None] = lambda _: None,
) -> dict[Path, Agreement]:
    """Hold files against the float file.

    Args:
        files: with the normalization of each; the reference is among them.
        reference: the float file.
        samples: what all are asked.
        kinds: of the reference's outputs, by name; of others the kind is proposed.
        say: called with what is being done.

    Raises:
        UsageError: an output or a kind that there is not.
        DataError: samples that a file does not take.
    """
    loaded = {path: runtime.session(path) for path in files}
    first = _ask(loaded, files, reference, rows(samples, slice(1)))
    outputs = _outputs(first, kinds)
    tallies = {path: _tallies(outputs) for path in files if path != reference}
    values = sum(math.prod(array.shape) for array in first.values())
    batch = fixed_batch(loaded[reference]) or max(1, min(MOST, VALUES // max(values, 1)))
    say("agreement with the float file")
    for start in range(0, length(samples), batch):
        part = rows(samples, slice(start, start + batch))
        wanted = list(_ask(loaded, files, reference, part).values())
        for path in list(tallies):
            have = list(_ask(loaded, files, path, part).values())
            if [x.size for x in have] != [x.size for x in wanted]:
                logger.warning("%s answers otherwise than %s: not compared", path, reference)
                del tallies[path]
                continue
            _add(tallies[path], wanted, have)
    return {path: _worst(found) for path, found in tallies.items()}


def _ask(
    loaded: Mapping[Path, runtime.Session],
    files: Mapping[Path, Normalization | None],
    path: Path,
    samples: Samples,
) -> dict[str, Array]:
    feed = feed_of(loaded[path], samples, files[path], path)
    return runtime.answers(loaded[path], feed, batch=MOST)


def _outputs(answer: Mapping[str, Array], kinds: Mapping[str, str]) -> dict[str, Output]:
    # torch takes seconds to import, and files with labels are measured without it
    from mpq.outputs import Evidence, propose, settle

    proposed = {
        name: propose(name, Evidence(x.shape, x.dtype.kind == "f"), alone=len(answer) == 1)
        for name, x in answer.items()
    }
    return settle(proposed, kinds)


def _tallies(outputs: Mapping[str, Output]) -> list[Tally]:
    from mpq.outputs import Tally

    return [Tally(output.kind) for output in outputs.values()]


def _add(tallies: Sequence[Tally], wanted: Sequence[Array], have: Sequence[Array]) -> None:
    import torch

    for tally, want, found in zip(tallies, wanted, have, strict=True):
        if tally.kind != "ignored":
            tally.add(torch.from_numpy(want), torch.from_numpy(found.reshape(want.shape)))


def _worst(tallies: Sequence[Tally]) -> Agreement:
    """The least of what is judged; a choice is judged by agreement alone."""
    found = [(tally, tally.result()) for tally in tallies if tally.kind != "ignored"]
    shares = [100 * r.agreement for _, r in found if r.agreement is not None]
    powers = [r.sqnr_db for _, r in found if r.agreement is None and r.sqnr_db is not None]
    return Agreement(min(shares, default=None), min(min(powers), EXACT_DB) if powers else None)
