"""`QuantGraph`: the one thing that every pass takes and changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from mpq.calls import Inputs, leaves
from mpq.errors import GraphError
from mpq.layers import FloatPart, LayerChoice, LayerInfo
from mpq.outputs import Output
from mpq.policy import Policy
from mpq.spec import QuantSpec
from mpq.target import Support

Role = Literal["input", "layer", "op", "demand"]
Stage = Literal["traced", "float", "annotated", "prepared", "frozen"]
CACHED_BYTES = 8 * 2**20
"""Values of a layer, as floats, that a pass over many samples holds at a time, at most."""


@dataclass(frozen=True, slots=True)
class Site:
    """One activation quantizer.

    Args:
        name: module path of the quantizer, `quantizers.<node>`.
        node: name of the graph node whose output it rounds.
        role: what made it necessary: `input`, `layer`, `op`, `demand`.
        spec: its format.
        ceiling: 6.0 where it absorbs a ReLU6.
        readers: layers that read the tensor, possibly through operations that only move values.
    """

    name: str
    node: str
    role: Role
    spec: QuantSpec
    ceiling: float | None = None
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of one layer: the policy's choice, the target's answer, the input's quantizer.

    `site` is the name of the quantizer whose grid the input lies on, or None.
    """

    choice: LayerChoice
    support: Support
    site: str | None
    notes: tuple[str, ...] = ()


@dataclass
class QuantGraph:
    """A traced network on its way from float to frozen.

    Args:
        module: the graph; module paths are those of the original model.
        example: one batch as the graph takes it: a lone tensor `[N, ...]`, or a dict of inputs by
            name, nested as the network takes them.
        outputs: the tensors that it answers with (`mpq.calls.leaves`) by name, with their kinds,
            found by `describe`.
        exact: names of nodes that give whole numbers or truth values, which no quantizer rounds.
        frozen: what the example decided and holds for every other call, in words.
        sizes: why it holds at the sizes of the example only; empty: at any where it runs.
        layers: quantizable layers in execution order, by module path.
        besides: what it stores and computes besides the layers, in float.
        sites: quantizers by module path, filled by annotation.
        plans: what becomes of each layer, filled by annotation.
        policy: what was asked, set by annotation; what is written of the graph takes it from here.
        islands: module paths of untraceable leaves, with the reason.
        folded: what folding a batch norm multiplied each output channel by `[C]`, by module path.
        stage: where in the pipeline the graph is; every pass states the stage it needs.
    """

    module: fx.GraphModule
    example: Inputs
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
    besides: tuple[FloatPart, ...] = ()
    frozen: tuple[str, ...] = ()
    sizes: str = ""
    sites: dict[str, Site] = field(default_factory=dict)
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    policy: Policy | None = None
    islands: dict[str, str] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    stage: Stage = "traced"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that it takes, in order; `input` for a lone one."""
        return tuple(leaves(self.example, "input"))

    def copy(self) -> QuantGraph:
        """An independent copy, parameters included."""
        return copy.deepcopy(self)

    def batch(self, most: int = 128) -> int:
        """Samples to run at a time, 4 to `most`: as many as keep the largest layer's values small.

        Larger ones leave the cache, and pages that an allocator takes from the system and gives
        back are faulted in every time (`CACHED_BYTES`).
        """
        sizes = [max(layer.in_elements, layer.out_elements) for layer in self.layers.values()]
        return max(4, min(most, CACHED_BYTES // (4 * max(sizes, default=1))))

    def require(self, stage: Stage, purpose: str = "this") -> None:
        """Refuse a graph in another stage.

        Raises:
            GraphError: it is not in `stage`.
        """
        if self.stage != stage:
            raise GraphError(f"{purpose} needs a {stage} graph. Got stage {self.stage!r}.")
