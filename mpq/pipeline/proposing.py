"""How images are normalized, where neither the user nor the checkpoint says so."""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import nn

from mpq.data import DataSet, Normalization, sample_indices
from mpq.data.normalize import NAMED
from mpq.errors import UsageError
from mpq.policy import ModelInfo
from mpq.train.evaluate import predict, top1

logger = logging.getLogger(__name__)
PROPOSAL_IMAGES, PROPOSAL_PIXELS = 256, 2**22
"""Images that each normalization is tried on, and their pixels, at most."""
MIN_PROPOSAL = 2.0
"""A proposed normalization must classify at least this many times better than chance."""


def propose_normalization(module: nn.Module, info: ModelInfo, data: DataSet) -> Normalization:
    """The named normalization under which the network classifies training images best.

    Raises:
        UsageError: none does better than guessing.
    """
    if not data.labelled:
        raise UsageError(
            "--normalize must be given: the checkpoint does not carry it, and without labels none "
            f"can be proposed. Give --normalize {', '.join(NAMED)} or m,m,m/s,s,s."
        )
    train = data.train
    size = math.prod(data.size)
    picked = sample_indices(train, max(1, min(PROPOSAL_IMAGES, PROPOSAL_PIXELS // size)), 0)
    images, labels = train.read(picked), train.labels[picked]
    logits = {name: predict(module, images, how) for name, how in NAMED.items()}
    found = {name: top1(z, labels) for name, z in logits.items()}
    loss = {name: float(F.cross_entropy(z, torch.from_numpy(labels))) for name, z in logits.items()}
    # Several may classify all images right; the surest of them is the one of the training.
    ranked = sorted(found, key=lambda name: (-found[name], loss[name]))
    listed = ", ".join(f"{name} {found[name]:.1f} %" for name in ranked)
    if found[ranked[0]] < MIN_PROPOSAL * 100 / info.classes:
        raise UsageError(
            "--normalize must be given: the checkpoint does not carry it, and no known one "
            f"classifies {len(labels)} training images better than guessing ({listed}). Give "
            "--normalize m,m,m/s,s,s, and check that data and model belong together."
        )
    logger.warning(
        "taking normalization %s, under which %d training images are classified best "
        "(%s); --normalize sets another",
        ranked[0],
        len(labels),
        listed,
    )
    return NAMED[ranked[0]]
