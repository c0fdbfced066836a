"""What a network stores and computes besides its layers: it stays in float, and has a name.

Recurrent layers, embeddings, norms, attention between activations, and whatever tensor a forward
reads. Every stored byte and every multiply-accumulate is in a layer or here; what the nodes of the
exported graph take themselves is here too, as it would be at 8 bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from mpq.checkpoint import weights_hash
from mpq.graph.annotate import annotate
from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.shapes import run_example
from mpq.layers import FloatPart
from mpq.policy import Policy
from mpq.quant.operation import LAYERS, refusal

GRAPH = "graph"
"""Kind of the row of what is no tensor."""
SITE_BYTES, OTHER_BYTES = 98, 60
NODE_BYTES = {
    **dict.fromkeys(("placeholder", "output", "layer", "get_attr", "identity", "part", "dim"), 0),
    **dict.fromkeys(("add", "mul", "sub", "truediv", "relu", "sigmoid", "softmax", "GELU"), 20),
    **dict.fromkeys(("global_avgpool", "matmul", "gelu", "to", "float", "Softmax", "tanh"), 27),
    **dict.fromkeys(("concat", "transpose", "hardsigmoid", "slice", "relu6", "mean", "pad"), 40),
    **dict.fromkeys(("maxpool", "avgpool", "split"), 80),
    **{
        "flatten": 40,
        "unbind": 0,
        "floordiv": 0,
        "shape": 5,
        "scaled_dot_product_attention": 250,
        "interpolate": 120,
    },
}
"""Average bytes in a file of a quantizer, and of what each kind of node becomes."""
_REASONS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.RNNBase, nn.RNNCellBase), "no integer kernel for recurrent layers"),
    nn.Embedding: "a table that is looked up, no matrix product",
    nn.MultiheadAttention: "attention with masks or to another sequence is not opened",
}
_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Functions on two activations, and the place of the first of them."""


def besides(qg: QuantGraph) -> int:
    """Fill `qg.besides` of a graph whose layers are known; return how many parts there are."""
    work = _Parts(qg)
    run_example(qg, work)
    graph = FloatPart(GRAPH, GRAPH, _graph_bytes(qg), 0, "nodes and quantizers of the file")
    qg.besides = (*work.parts.values(), graph)
    return len(qg.besides)


class _Parts(fx.Interpreter):
    """Runs one image and notes what each node reads that is no layer's, and multiplies."""

    def __init__(self, qg: QuantGraph) -> None:
        super().__init__(qg.module)
        self.qg, self.parts = qg, dict[str, FloatPart]()
        self.seen: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        given = self.map_nodes_to_values(n.args, n)
        out = super().run_node(n)
        if n.op == "get_attr" and isinstance(out, Tensor):
            self.add(str(n.target), "tensor", [out], 0, "read as it is, not as a layer's weights")
        elif n.op == "call_module" and n.target not in self.qg.layers:
            for path, module in self.qg.module.get_submodule(str(n.target)).named_modules():
                self.called(f"{n.target}.{path}".rstrip("."), module, given, out)
        elif n.op in ("call_function", "call_method") and isinstance(out, Tensor):
            name = getattr(n.target, "__name__", str(n.target))
            macs = _function_macs(name, given, dict(n.kwargs), out)
            self.add(n.name, name, [], macs, "a product of two activations has no weights")
        return out

    def called(self, path: str, module: nn.Module, given: Any, out: Any) -> None:
        """A module that is no layer, or one inside of it."""
        if path in self.qg.layers:
            return
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            own = [t for t in own if t.ndim]  # the count of batches is not exported
        macs = _module_macs(module, given, out)
        self.add(path, type(module).__name__, own, macs, self.reason(path, module))

    def reason(self, path: str, module: nn.Module) -> str:
        """Why a module stays in float."""
        if type(module) in LAYERS:
            return refusal(module) or "a module of torch's own reads its weight"
        known = (why for kind, why in _REASONS.items() if isinstance(module, kind))
        kind = type(module).__name__
        return next(known, self.qg.islands.get(path, f"no integer kernel for {kind}"))

    def add(self, name: str, kind: str, tensors: list[Tensor], macs: int, reason: str) -> None:
        """One part, unless it is nothing; equal tensors are stored once."""
        new = {weights_hash({"tensor": t}): t for t in tensors}
        size = sum(t.numel() * t.element_size() for key, t in new.items() if key not in self.seen)
        self.seen |= new.keys()
        if (size or macs) and name not in self.parts:
            self.parts[name] = FloatPart(name, kind, size, macs, reason)


def _function_macs(name: str, args: Any, kwargs: dict[str, Any], out: Tensor) -> int:
    """Multiply-accumulates of a product of activations for one image; 0 of anything else."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if name in _PRODUCTS and len(args) > _PRODUCTS[name]:
        return out.numel() * int(args[_PRODUCTS[name]].shape[-1])
    if name == "scaled_dot_product_attention" and len(tensors) > 2:
        q, k, v = tensors[:3]
        return q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if name == "einsum" and len(tensors) > 1 and isinstance(args[0], str):
        terms = args[0].partition("->")[0].replace(" ", "").split(",")
        sizes = {c: s for term, t in zip(terms, tensors, strict=False)
                 for c, s in zip(term, t.shape, strict=False)}  # fmt: skip
        return math.prod(sizes.values())
    if name in ("conv1d", "conv2d", "conv3d", "linear") and len(tensors) > 1:
        return out.numel() * tensors[1][0].numel()
    return 0


def _module_macs(module: nn.Module, given: Any, out: Any) -> int:
    """Multiply-accumulates of a module of torch for one image."""
    x = given[0] if given and isinstance(given[0], Tensor) else None
    if x is None or not x.ndim:
        return 0
    weights = sum(p.numel() for n, p in module.named_parameters() if "weight" in n)
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return x.shape[:-1].numel() * weights
    if isinstance(module, nn.MultiheadAttention):
        other = int(given[1].shape[-2 if module.batch_first else 0]) if len(given) > 1 else 0
        return x.shape[:-1].numel() * (weights + 2 * other * int(module.embed_dim))
    if type(module) in LAYERS and isinstance(out, Tensor):
        moved = x if "Transpose" in type(module).__name__ else out
        return moved.numel() * module.weight[0].numel()  # type: ignore[index]
    return 0


def _graph_bytes(qg: QuantGraph) -> int:
    """What quantizers and nodes other than layers take in the file."""
    annotated = replace(qg, sites={}, plans={})
    annotate(annotated, Policy.uniform(8))
    return SITE_BYTES * len(annotated.sites) + sum(_node_bytes(qg))


def _node_bytes(qg: QuantGraph) -> Iterator[int]:
    modules, kinds = dict(qg.module.named_modules()), Counter[str]()
    for node in qg.module.graph.nodes:
        kind = kind_of(node, modules)
        if kind == "other":
            called = modules.get(str(node.target)) if node.op == "call_module" else None
            kind = getattr(node.target, "__name__", str(node.target))
            kind = kind if called is None else type(called).__name__
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        of_split = kind == "slice" and kind_of(source, modules) == "split"
        kinds["part" if of_split else kind] += 1
    for kind, count in kinds.items():
        yield count * NODE_BYTES.get(kind, OTHER_BYTES)
