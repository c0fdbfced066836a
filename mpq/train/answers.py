"""Teachers' answers that are kept: a run on images that were answered before skips the teachers.

The images of an epoch depend on data, augmentation, seed and epoch alone, never on the student, so
that students of other widths, losses or weightings can learn from one set of answers: the idea of
Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022. Here
all logits are kept as the teachers gave them, so a run is the same bit for bit with and without.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq.checkpoint import weights_hash
from mpq.errors import CheckpointError
from mpq.saved import Kind
from mpq.train.ensemble import Ensemble
from mpq.train.recipe import Recipe

logger = logging.getLogger(__name__)
KIND = Kind(
    "mpq/answers",
    1,
    "hold a teacher's answers as mpq writes them. Delete it, and they are computed again.",
)

IMAGE_KEYS = (
    "batch",
    "accumulate",
    "precision",
    "channels_last",
    "crop",
    "flip",
    "trivial",
    "erase",
    "mixup",
    "cutmix",
    "mix_probability",
)
"""The choices of a recipe that decide which images a teacher sees, and how it computes."""

RAND_KEYS = ("rand_operations", "rand_magnitude")
"""More of them, counted only where they are on: answers from before there were these stay good."""


def answer_folders(
    root: Path, teacher: Ensemble, recipe: Recipe, identity: Mapping[str, Any]
) -> list[Path]:
    """Where the answers of each member to these images lie, so that other ensembles share them.

    Args:
        root: the folder of all answers.
        teacher: the teachers; weights, normalization and input size of each count.
        recipe: of the run; what `IMAGE_KEYS` names counts.
        identity: all else that decides: data, seed, processes, device.
    """
    names = IMAGE_KEYS + (RAND_KEYS if recipe.rand_operations else ())
    names += ("alternate",) if recipe.alternate else ()
    images = {name: getattr(recipe, name) for name in names} | dict(identity)
    folders = []
    for member in teacher.members:
        key = [weights_hash(member.module.state_dict()), str(member.normalize), member.input]
        digest = hashlib.sha256(json.dumps([key, images], sort_keys=True).encode()).hexdigest()
        folders.append(root / f"{member.name}-{digest[:16]}")
    return folders


class Answers:
    """The logits of every teacher for one epoch: read from their files, or recorded for them.

    Args:
        paths: the file of each teacher for this epoch.

    Raises:
        CheckpointError: a file is there but not what `close` wrote.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._known = [_read(path) if path.is_file() else None for path in paths]
        self._new: list[list[Tensor]] = [[] for _ in paths]
        self._taken = 0

    @property
    def complete(self) -> bool:
        """Whether nothing has to be computed."""
        return all(known is not None for known in self._known)

    def take(self, count: int, ask: Callable[[int], Tensor]) -> Tensor:
        """Logits `[K, count, C]` of the next images: known, or what `ask(k)` computes.

        Raises:
            CheckpointError: a file ends before the epoch does.
        """
        rows = []
        for k, known in enumerate(self._known):
            if known is None:
                rows.append(ask(k))
                self._new[k].append(rows[-1].detach().cpu())
                continue
            rows.append(known[self._taken : self._taken + count])
            if len(rows[-1]) != count:
                raise CheckpointError(f"{self.paths[k]} must answer a whole epoch. Delete it.")
        self._taken += count
        device = next(
            (r.device for r, known in zip(rows, self._known, strict=True) if known is None), None
        )
        return torch.stack([r if device is None else r.to(device) for r in rows])

    def close(self) -> None:
        """Write what was recorded; the epoch is over. A full disk costs only time later."""
        for path, known, new in zip(self.paths, self._known, self._new, strict=True):
            if known is not None:
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                KIND.save(path, {"logits": torch.cat(new)})
            except (OSError, CheckpointError) as error:
                logger.warning("the answers of a teacher are not kept: %s", error)


def _read(path: Path) -> Tensor:
    logits: Tensor = KIND.read(path)["logits"]
    return logits
