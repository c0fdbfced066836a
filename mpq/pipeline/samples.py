"""From samples as data have them to inputs and answers, whatever a network takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq.calls import Inputs, call, refill, split
from mpq.capture.network import Network
from mpq.data import Normalization
from mpq.data.dataset import Samples
from mpq.errors import DataError
from mpq.train.evaluate import class_logits, evaluating

BATCH = 64
"""Samples that a network is asked at a time."""


def as_inputs(samples: Samples, normalize: Normalization, network: Network | None) -> Inputs:
    """Inputs as a network takes them.

    Args:
        samples: uint8 `[N, H, W, C]`, which are normalized, or arrays by name of input.
        normalize: of images.
        network: an example call, of one that takes anything but one batch of images.

    Raises:
        DataError: arrays by other names.
    """
    if isinstance(samples, np.ndarray):
        return torch.from_numpy(normalize.apply(samples))
    tensors = {name: torch.from_numpy(array) for name, array in samples.items()}
    if network is None:
        return next(iter(tensors.values()))
    names = list(network.specs)
    if len(names) > 1 and set(names) != set(tensors):
        raise DataError(
            f"data must give the inputs {', '.join(names)}, as the network takes them. Got "
            f"{', '.join(tensors)}."
        )
    given = tensors if len(names) < 2 else {name: tensors[name] for name in names}
    inputs: Inputs = refill(network.example, given.values())
    return inputs


def ask(module: nn.Module, inputs: Inputs, network: Network | None) -> Any:
    """What a network, or a graph made from it, answers."""
    if network is not None and module is network.module:
        return network.answer(inputs)
    return call(module, inputs)


def logits_of(module: nn.Module, inputs: Inputs, network: Network | None) -> Tensor:
    """Logits `[N, C]` of a classifier, in eval mode.

    Raises:
        DataError: it answers with something else.
    """
    with evaluating(module):
        return torch.cat(
            [class_logits(ask(module, part, network)) for part in split(inputs, BATCH)]
        )
