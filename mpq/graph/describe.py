"""Find the layers and measure them: one forward of one image with hooks on every layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, fx, nn

from mpq.errors import GraphError
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import find_outputs
from mpq.graph.shapes import run_example
from mpq.hooks import hooked
from mpq.layers import LayerInfo, LayerKind
from mpq.quant.operation import LAYERS, LayerOp, refusal

logger = logging.getLogger(__name__)
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def describe(qg: QuantGraph) -> int:
    """Fill `qg.layers` in execution order, `outputs` and `exact`; return how many layers there are.

    Raises:
        GraphError: the model cannot run on the example, or has no layer to quantize.
    """
    found: dict[str, LayerInfo] = {}
    layers = (
        (name, module)
        for name, module in qg.module.named_modules()
        if type(module) in LAYERS and refusal(module) is None and not _inside_of_torch(qg, name)
    )
    with hooked(m.register_forward_hook(_recorder(name, found)) for name, m in layers):
        answer = run_example(qg, run := _Exact(qg.module))
    if not found:
        raise GraphError("the model has no Conv or Linear layer, so there is nothing to quantize.")
    constant = _constant(qg.module.graph)
    qg.layers = {n: replace(info, constant=n in constant) for n, info in found.items()}
    qg.exact = frozenset(run.found)
    qg.outputs = find_outputs(qg, answer)
    return len(found)


def _constant(graph: fx.Graph) -> set[str]:
    """Paths of the modules that read no input of the network, such as one on a table of places."""
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    return {str(node.target) for node in graph.nodes if node.op == "call_module"
            and node not in fed}  # fmt: skip


class _Exact(fx.Interpreter):
    """Notes the nodes whose tensors are no floats."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[str] = []

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        if isinstance(out, Tensor) and not out.is_floating_point():
            self.found.append(n.name)
        return out


def _inside_of_torch(qg: QuantGraph, name: str) -> bool:
    """Whether a module of torch's own (an encoder layer) owns the layer and reads its weight."""
    for end in (i for i, letter in enumerate(name) if letter == "."):
        owner = type(qg.module.get_submodule(name[:end]))
        if owner.__module__.startswith("torch.nn.modules.") and owner not in _CONTAINERS:
            logger.warning("%s stays in float: %s reads its weight", name, owner.__name__)
            return True
    return False


def _recorder(
    name: str, found: dict[str, LayerInfo]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        found.setdefault(name, _info(name, module, args[0], out))

    return hook


def _kind(module: nn.Module) -> LayerKind:
    op = LayerOp.of(module)
    if op.kind != "conv":
        return op.kind
    return "depthwise" if op.groups > 1 and op.groups == module.in_channels else "conv"


def _info(name: str, module: nn.Module, x: Tensor, out: Tensor) -> LayerInfo:
    weight = module.weight
    assert isinstance(weight, Tensor)
    op = LayerOp.of(module)
    channels = out.shape[op.channel(out)]
    positions = (x if op.kind == "conv_transpose" else out).numel() // out.shape[0]
    width = x.shape[1] if op.kind == "conv_transpose" else channels
    return LayerInfo(
        name=name,
        kind=_kind(module),
        weight_shape=tuple(weight.shape),
        out_channels=int(channels),
        bias=module.bias is not None,
        macs=weight.numel() * positions // width,
        in_elements=x.numel() // x.shape[0],
        out_elements=out.numel() // out.shape[0],
        grouped=op.groups > 1,
        strided=any(step > 1 for step in op.stride),
        dilated=any(step > 1 for step in op.dilation),
    )
