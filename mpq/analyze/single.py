"""One candidate at a time: the divergence or the loss that it really causes, measured by running.

The reference that cheap metrics are measured against; it costs a partial forward pass for each
layer and width. A candidate changes nothing before its own node, so only what follows is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpq.analyze.batches import Batch, Batches, Rows
from mpq.analyze.perturb import Column, Perturbations
from mpq.analyze.watch import Watch, require_finite
from mpq.numerics import kl_divergence


@torch.no_grad()
def single_scores(
    candidates: Perturbations,
    columns: Sequence[Column],
    batches: Batches,
) -> list[float]:
    """What each candidate alone costs, in nats, in the order of `columns`; never below 0.

    Args:
        candidates: what quantization would do to each tensor.
        columns: candidates to score.
        batches: images; with labels, the cost is the mean increase of the cross-entropy, without
            the mean `KL(p || p_candidate)` from the network's own answers. Each candidate counts
            as progress.

    Raises:
        DataError: NaN or infinity, with the layer where it begins.
    """
    runner = _Runner(candidates)

    def measure(part: Batch) -> Rows:
        reference = runner.start(part.images).double().log_softmax(-1)
        require_finite(reference, candidates.graph, part.images)
        rows = torch.zeros(len(part.images), len(columns), dtype=torch.float64)
        for index, column in enumerate(columns):
            logits = runner.again(column)
            if logits is not None:
                changed = logits.double().log_softmax(-1)
                rows[:, index] = _cost(reference, changed, part.labels).cpu()
            part.tick()
        return rows.numpy()

    rows = batches.rows(measure, ticks=len(columns))
    return [max(float(value), 0.0) for value in rows.mean(0)]


def _cost(reference: Tensor, changed: Tensor, labels: Tensor | None) -> Tensor:
    """Of each image, from log-probabilities `[n, ..., C]`."""
    if labels is None:
        return kl_divergence(reference, changed).reshape(len(reference), -1).sum(1)
    labels = labels.to(reference.device)
    before, after = (F.nll_loss(p, labels, reduction="none") for p in (reference, changed))
    return (after - before).reshape(len(reference), -1).sum(1)


class _Runner:
    """Runs a batch once and keeps every tensor, then runs what follows a changed one."""

    def __init__(self, candidates: Perturbations) -> None:
        self.candidates, self.graph = candidates, candidates.graph
        self.order = {node.name: i for i, node in enumerate(self.graph.module.graph.nodes)}
        self.env: dict[fx.Node, Any] = {}

    def start(self, images: Tensor) -> Tensor:
        """Logits of the float network."""
        whole = fx.Interpreter(self.graph.module, garbage_collect_values=False)
        logits: Tensor = whole.run(images)
        self.env = dict(whole.env)
        return logits

    def again(self, column: Column) -> Tensor | None:
        """Logits with one candidate in force; None where it has no noise."""
        layer, part, bits = column
        if part == "weight":
            weight = self.candidates.weight(layer)
            kept = weight.clone()
            weight += self.candidates.weights[layer, bits]  # shares memory with the parameter
            logits = self._rest(self._node_of(layer), fx.Interpreter(self.graph.module))
            weight.copy_(kept)
            return logits
        tensor = self.candidates.tensor_of(layer)
        if tensor is None or (tensor, bits) not in self.candidates.grids:
            return None
        grid = self.candidates.grids[tensor, bits]
        watch = Watch(self.graph, [tensor], lambda _, x: x + grid.noise(x))
        return self._rest(tensor if tensor in self.order else self._node_of(tensor), watch)

    def _node_of(self, layer: str) -> str:
        """Name of the node that calls a layer, or calls the module that it is inside of."""
        for node in self.graph.module.graph.nodes:
            if node.op == "call_module" and f"{layer}.".startswith(f"{node.target}."):
                return str(node.name)
        raise AssertionError(f"layer {layer} is called by no node")

    def _rest(self, first: str, interpreter: fx.Interpreter) -> Tensor:
        start = self.order[first]
        before = {n: v for n, v in self.env.items() if self.order[n.name] < start}
        # A placeholder consumes an argument; those before `first` are in the environment.
        inputs = [v for n, v in self.env.items() if n.op == "placeholder"]
        logits: Tensor = interpreter.run(*inputs, initial_env=before)
        return logits
