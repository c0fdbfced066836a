"""Scores of a network, from where they lie already or else by scoring.

Scores are kept in the run (`sensitivity.json`) and under `runs/.scores`, with a key that hashes
network, images and settings: another budget, or another run of the same network, scores nothing
again. What an interrupted scoring has done lies there too, and the next one goes on from it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mpq import files, rundir
from mpq.analyze.score import Scoring, score_layers
from mpq.analyze.sensitivity import Sensitivity
from mpq.calls import Inputs
from mpq.errors import PolicyError
from mpq.graph.ir import QuantGraph
from mpq.rundir import Run

logger = logging.getLogger(__name__)
KEPT = ".scores"
"""Folder beside the runs."""


def scores_of(
    graph: QuantGraph,
    images: Inputs | None,
    labels: Any,
    how: Scoring,
    *,
    run: Run,
    rescore: bool = False,
) -> tuple[Sensitivity, Path | None]:
    """The scores, and the file that they were found in (None where they were made now).

    Args:
        graph: in stage `float`.
        images: normalized, or inputs; None for data-free scores.
        labels: of the images, for the metrics that compare with them; for a loss the whole batch.
        how: how to score.
        run: its `sensitivity.json` is looked into before the cache; without a folder nothing is
            looked for, and nothing kept.
        rescore: look into neither.

    Raises:
        As `mpq.analyze.score_layers`.
    """
    tell = run.phase("scoring")
    if run.folder is None:
        return score_layers(graph, images, labels, how, progress=tell), None
    key = how.key(graph, images, labels)
    kept = rundir.RUNS / KEPT / f"{key[:16]}.json"
    for place in () if rescore else (run.folder / "sensitivity.json", kept):
        found = _read(place, key)
        if found is not None:
            return found, place
    partial = kept.with_suffix(".part.npz")
    made = score_layers(graph, images, labels, how, key=key, partial=partial, progress=tell)
    _keep(made, kept)
    return made, None


def _read(path: Path, key: str) -> Sensitivity | None:
    """The scores in a file, if it is one of these scores."""
    try:
        text = path.read_text(encoding="utf-8")
        if key not in text:
            return None
        found = Sensitivity.from_json(text, str(path))
    except (OSError, UnicodeDecodeError, PolicyError):
        return None
    return found if found.key == key else None


def _keep(made: Sensitivity, path: Path) -> None:
    """Write the scores into the cache; one that cannot be written costs time, never the run."""
    try:
        files.write_json(path, made.to_json())
    except OSError as error:
        logger.warning("scores are not kept in %s: %s", path.parent, error.strerror)
