"""What a run leaves in its folder: `checkpoint.pth` and `metrics.jsonl`.

Both are replaced whole, so a killed run leaves the state of its last finished epoch. All randomness
of an epoch derives from (seed, epoch), hence weights, optimizer, average and history are the full
state, and a resumed run equals an uninterrupted one bit for bit on a CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.data.stream import Stream
from mpq.errors import TrainError
from mpq.saved import Kind
from mpq.train.evaluate import Images, Labels
from mpq.train.metrics import METRICS, Record, write_metrics
from mpq.train.optim import Ema
from mpq.train.recipe import Recipe

KIND = Kind("mpq/training", 1, "be a training checkpoint of mpq, but is none.", TrainError)
CHECKPOINT = "checkpoint.pth"


@dataclass
class State:
    """The moving parts of a run.

    Args:
        model: the student, not wrapped.
        optimizer: its optimizer.
        ema: its moving average, if any.
        identity: what must be equal for a run to be continued.
        epoch: epochs done.
        history: a record for each of them.
        best: the weights of the best epoch, where a metric judges.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    identity: Mapping[str, Any]
    epoch: int = 0
    history: list[Record] = field(default_factory=list)
    best: dict[str, Any] | None = None

    @property
    def evaluated(self) -> nn.Module:
        """What is measured: the average if there is one."""
        return self.ema.module if self.ema else self.model

    def save(self, folder: Path) -> None:
        """Replace the checkpoint, then the metrics."""
        content = {
            "identity": dict(self.identity),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "ema_updates": self.ema.updates if self.ema else 0,
            "history": self.history,
        }
        if self.best is not None:
            content["best"] = self.best
        KIND.save(folder / CHECKPOINT, content)
        write_metrics(folder / METRICS, self.history)

    def load(self, folder: Path) -> None:
        """Take over the checkpoint of `folder`.

        Raises:
            TrainError: it belongs to another run: recipe, seed, data, model or teacher differ.
            CheckpointError: it is damaged.
        """
        path = folder / CHECKPOINT
        content = KIND.read(path)
        missing = {"identity", "epoch", "model", "optimizer", "ema", "history"} - set(content)
        if missing:
            raise TrainError(f"{path} must hold {', '.join(sorted(missing))}, but does not.")
        saved = dict(content["identity"])
        if "recipe" in saved:  # keys that came later, or are gone, are off by default
            known = {k: v for k, v in saved["recipe"].items() if v or k in Recipe.model_fields}
            saved["recipe"] = Recipe().model_dump() | known
        KIND.refuse_other_run(path, saved, self.identity)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(content["ema"])
            self.ema.updates = content["ema_updates"]
        self.best = content.get("best")
        self.epoch, self.history = content["epoch"], list(content["history"])
        write_metrics(folder / METRICS, self.history)


def fingerprint(images: Images, labels: Labels) -> str:
    """Short text that differs for different data."""
    if isinstance(images, Stream):
        return f"{len(images)} images in files {images.mark()}{zlib.crc32(labels.tobytes()):08x}"
    return (
        f"{len(images)} images {zlib.crc32(images.tobytes()):08x}{zlib.crc32(labels.tobytes()):08x}"
    )


def structure(model: nn.Module) -> str:
    """Short text that differs for models with other modules, widths, parameters or buffers."""
    names = ";".join(f"{k}{tuple(v.shape)}" for k, v in model.state_dict().items())
    return f"{type(model).__name__} {zlib.crc32(f'{names} {model!r}'.encode()):08x}"
