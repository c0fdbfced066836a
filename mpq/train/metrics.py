"""What is measured in an epoch, and the file it goes to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq.files import write_text
from mpq.train.objective import Parts

METRICS = "metrics.jsonl"

Record = dict[str, Any]
"""One epoch: epoch, lr, train_loss, train_label_loss, train_top1 (None without labels), val_top1
(None without validation), seconds; with teachers also train_distill_loss and teacher_weights (a
mean each). Of a metric of the user's own also metric and value, on validation images."""


class Totals:
    """Sums over an epoch, kept on the device so that adding does not wait for it."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.members = 0
        self.told = False

    def add(self, parts: Parts, student: Tensor, labels: Tensor | None) -> None:
        """Add one batch of logits `[B, C]`; mixed labels count as their larger half.

        Without labels `student` is anything that has one entry an image.
        """
        zero = torch.zeros_like(parts.label)
        hits, known = zero, zero
        if labels is not None:
            truth = labels if labels.ndim == 1 else labels.argmax(1)
            known = torch.ones_like(zero) if labels.ndim == 1 else (labels.sum(1) > 0).float()
            hits = ((student.argmax(1) == truth) * known).mean()
        self.told = parts.distill is not None
        values = [
            parts.loss.detach(),
            parts.label,
            zero if parts.distill is None else parts.distill,
        ]
        weights = [] if parts.weights is None else list(parts.weights.unbind())
        self.members = len(weights)
        count = len(student)
        row = torch.stack([torch.ones_like(zero), *values, hits, known.mean(), *weights])
        row = row.double() * count
        self.sums = row if self.sums is None else self.sums + row

    def record(self, accelerator: Any) -> Record:
        """Means over all processes."""
        assert self.sums is not None, "an epoch has at least one step"
        count, *sums = accelerator.reduce(self.sums, reduction="sum").tolist()
        loss, label, distill, hits, known, *weights = (v / count for v in sums)
        record: Record = {"train_loss": loss, "train_label_loss": label}
        if self.told:
            record["train_distill_loss"] = distill
        if self.members:
            record["teacher_weights"] = weights
        return {**record, "train_top1": 100 * hits / known if known else None}


def write_metrics(path: Path, history: Sequence[Record]) -> None:
    """Replace `metrics.jsonl`: one JSON object a line, one line an epoch."""
    text = "".join(json.dumps(record) + "\n" for record in history)
    write_text(path, text)
