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
from mpq.analyze.judge import Judge, logits_of
from mpq.analyze.perturb import Column, Perturbations
from mpq.analyze.watch import Watch, require_finite
from mpq.calls import Inputs, arguments
from mpq.graph.ir import QuantGraph


@torch.no_grad()
def single_scores(
    candidates: Perturbations, columns: Sequence[Column], batches: Batches
) -> list[float]:
    """What each candidate alone costs, in nats, in the order of `columns`; never below 0.

    Args:
        candidates: what quantization would do to each tensor.
        columns: candidates to score.
        batches: images; with labels, the cost is the mean increase of the cross-entropy, without
            the mean divergence from the network's own answers (`mpq.analyze.judge`). Each candidate
            counts as progress.

    Raises:
        GraphError: labels, and a network that is no classifier.
        DataError: NaN or infinity, with the layer where it begins.
    """
    runner, graph = _Runner(candidates), candidates.graph
    judge = Judge.of(graph, batches.images, batches.size)

    def cost(reference: Any, changed: Any, part: Batch) -> Tensor:
        if part.labels is None:
            return judge.cost(judge.answers(reference), judge.answers(changed), part.count)
        before, after = (_loss(graph, answer, part.labels) for answer in (reference, changed))
        return (after - before).cpu()

    def measure(part: Batch) -> Rows:
        reference = runner.start(part.images)
        require_finite(judge.answers(reference), graph, part.images)
        rows = torch.zeros(part.count, len(columns), dtype=torch.float64)
        for index, column in enumerate(columns):
            changed = runner.again(column)
            if changed is not None:
                rows[:, index] = cost(reference, changed, part)
            part.tick()
        return rows.numpy()

    rows = batches.rows(measure, ticks=len(columns))
    return [max(float(value), 0.0) for value in rows.mean(0)]


def _loss(graph: QuantGraph, answer: Any, labels: Tensor) -> Tensor:
    """The cross-entropy of each image."""
    found = logits_of(graph, answer, "the metric loss").double().log_softmax(1)
    return F.nll_loss(found, labels.to(found.device), reduction="none")


class _Runner:
    """Runs a batch once and keeps every tensor, then runs what follows a changed one."""

    def __init__(self, candidates: Perturbations) -> None:
        self.candidates, self.graph = candidates, candidates.graph
        self.order = {node.name: i for i, node in enumerate(self.graph.module.graph.nodes)}
        self.env: dict[fx.Node, Any] = {}

    def start(self, images: Inputs) -> Any:
        """What the float network answers."""
        whole = fx.Interpreter(self.graph.module, garbage_collect_values=False)
        answer = whole.run(*arguments(self.graph.module, images))
        self.env = dict(whole.env)
        return answer

    def again(self, column: Column) -> Any:
        """The answer with one candidate in force; None where it has no noise."""
        layer, part, bits = column
        if part == "weight":
            weight = self.candidates.weight(layer)
            kept = weight.clone()
            weight += self.candidates.weights[layer, bits]  # shares memory with the parameter
            answer = self._rest(self._node_of(layer), fx.Interpreter(self.graph.module))
            weight.copy_(kept)
            return answer
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

    def _rest(self, first: str, interpreter: fx.Interpreter) -> Any:
        start = self.order[first]
        before = {n: v for n, v in self.env.items() if self.order[n.name] < start}
        # A placeholder consumes an argument; those before `first` are in the environment.
        inputs = [v for n, v in self.env.items() if n.op == "placeholder" and n not in before]
        return interpreter.run(*inputs, initial_env=before)
