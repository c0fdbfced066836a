"""One candidate at a time: the KL divergence that it really causes, by running the network.

The reference that cheap metrics are measured against; it costs a partial forward pass for each
layer and width. A candidate changes nothing before its own node, so only what follows is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpq.analyze.perturb import Column, Perturbations, Progress
from mpq.analyze.watch import Watch, require_finite


@torch.no_grad()
def kl_scores(
    candidates: Perturbations,
    columns: Sequence[Column],
    images: Tensor,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> list[float]:
    """Mean `KL(p || p_candidate)` in nats, in the order of `columns`.

    Raises:
        DataError: NaN or infinity, with the layer where it begins.
    """
    totals = [0.0] * len(columns)
    done, total = 0, len(columns) * len(images)
    runner = _Runner(candidates)
    for part in torch.split(images, batch):
        reference = runner.start(part).float().log_softmax(-1)
        require_finite(reference, candidates.graph, part)
        for index, column in enumerate(columns):
            logits = runner.again(column)
            if logits is not None:
                changed = logits.float().log_softmax(-1)
                totals[index] += float((reference.exp() * (reference - changed)).sum())
            done += len(part)
            if progress:
                progress(done, total)
    return [max(value / len(images), 0.0) for value in totals]


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
        logits = self._rest(tensor if tensor in self.order else self._node_of(tensor), watch)
        watch.close()
        return logits

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
