"""The network's own training step on the layers of its quantized graph: `--loss own`.

A network that computes its loss by itself has a `training_step(batch)`, as Lightning names it, or
answers a batch with losses in training mode, as detectors of torchvision do. Its graph holds
nothing of that. So a copy of the network is taken in which each layer is that of the graph, with
what rounds its input: the very parameters that the graph has, and what the step teaches them, the
graph has learnt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpq.batch import described
from mpq.errors import MpqError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.quant.layer import QuantLayer
from mpq.userimport import raised

ELSE = "Give --loss module:function of outputs and batch, or no loss: the float network teaches."


class OwnStep(nn.Module):
    """Batches to losses.

    Args:
        network: in float, as the user wrote it; it stays as it is.
        graph: made from it, in stage `prepared`.

    Raises:
        UsageError: a layer of the graph is no module of the network.
    """

    def __init__(self, network: nn.Module, graph: QuantGraph) -> None:
        super().__init__()
        parts, known = dict(graph.module.named_modules()), dict(network.named_modules())
        calls = {name: _calls(name, parts, known) for name in known}
        lost = graph.layers.keys() - {layer for names in calls.values() for layer in names}
        if lost:
            raise UsageError(
                f"--loss own trains layers that are modules of the network. {min(lost)} is none: "
                f"it was found in the code of its forward. {ELSE}"
            )
        self.network = copy.deepcopy(network).requires_grad_(False)
        for name, part in known.items():
            if calls[name]:
                self.network.set_submodule(name, _Rounded([parts[n] for n in calls[name]]))
            elif name not in parts and isinstance(part, _BatchNorm):
                self.network.set_submodule(name, nn.Identity())  # it was folded
        trained = dict(graph.module.named_parameters())
        for name, value in list(self.network.named_parameters()):
            if name in trained and trained[name].shape == value.shape:
                place, _, own = name.rpartition(".")
                self.network.get_submodule(place)._parameters[own] = trained[name]
        self.network.train()

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Raises:
            UsageError: the step fails, or gives no loss that has a gradient.
        """
        try:
            found = self._called(batch)
        except MpqError:
            raise
        except Exception as error:  # the user's code can fail in any way
            raise UsageError(
                f"--loss own: the network's own training step failed with {raised(error)}. It was "
                f"given {described(batch)}. {ELSE}"
            ) from error
        loss = _loss(found)
        if loss is None or not loss.requires_grad:
            raise UsageError(
                "--loss own: training_step(batch), or the network called with a batch in training "
                "mode, must give a loss with a gradient: a scalar, `loss` of a dict or an object, "
                f"or a dict of scalars, which are added up. Got {described(found)}. {ELSE}"
            )
        return loss.float()

    def _called(self, batch: Any) -> Any:
        step = getattr(self.network, "training_step", None)
        if step is not None:
            numbered = len(inspect.signature(step).parameters) > 1
            return step(batch, 0) if numbered else step(batch)
        if isinstance(batch, Mapping):
            return self.network(**batch)
        return self.network(*(batch if isinstance(batch, tuple | list) else [batch]))


def _calls(name: str, parts: Mapping[str, nn.Module], known: Mapping[str, nn.Module]) -> list[str]:
    """Paths of the quantized layers that stand for a module: one for each call, as graphs have."""
    found = [name] if isinstance(parts.get(name), QuantLayer) else []
    while found and (path := f"{name}_{len(found) + 1}") not in known:
        if not isinstance(parts.get(path), QuantLayer):
            break
        found.append(path)
    return found


class _Rounded(nn.Module):
    """The quantized layers of a module, one for each call, for whoever called the float one."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.calls = nn.ModuleList(
            nn.Sequential(layer.source or nn.Identity(), layer) for layer in layers
        )
        self.called = 0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.calls[self.called % len(self.calls)](x)
        self.called += 1
        return out


def _loss(found: Any) -> Tensor | None:
    """The scalar in what a training step gives."""
    if isinstance(found, Mapping):
        every = [value for value in found.values() if _scalar(value)]
        found = found["loss"] if "loss" in found else sum(every) if every else None
    found = getattr(found, "loss", found)
    return found.reshape(()) if _scalar(found) else None


def _scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()
