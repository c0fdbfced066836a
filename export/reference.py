"""A whole file by the integer reference: what it answers on a CPU that is not here.

The graph that onnxruntime makes of the file is the same wherever it runs, but for the kernels. So
it is made here and walked with the kernels of the other CPU (`arithmetic.py`): every integer of the
file is then known from the file and the images alone. Float operations between run in the runtime
at hand, one by one; their last bits may differ elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mpq.target import Arithmetic

from . import runtime
from .arithmetic import kernels_of
from .exact import REFERENCED, by_onnx, supported
from .feeds import Feed, feeds, named, parts

Array = NDArray[Any]
Values = dict[str, Array]
BATCH = 32
"""Images at a time: the values of a batch are in memory together."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The judge of a file for a kind of CPU that this computer is not.

    Args:
        arithmetic: whose kernels are computed.
    """

    arithmetic: Arithmetic

    def answers(self, model: bytes, inputs: Feed, *, batch: int = BATCH) -> Values:
        """Every output by name for many samples, as `runtime.answers`.

        Raises:
            ExportError: the runtime cannot load the file, or a node has no reference.
        """
        walk = _Walk(model, self.arithmetic)
        given = feeds(walk.loaded, inputs)
        total = max((len(x) for x in given.values() if x.ndim), default=0)
        step = runtime.fixed_batch(walk.loaded) or min(batch, BATCH)
        found = [walk.values(part, walk.outputs) for part in parts(given, total, step)]
        return {name: np.concatenate([np.atleast_1d(part[name]) for part in found])
                for name in walk.outputs}  # fmt: skip

    def values(self, model: bytes, inputs: Feed, names: Sequence[str]) -> Values:
        """Named graph outputs for one batch, as `runtime.values`."""
        walk = _Walk(model, self.arithmetic)
        return walk.values(named(inputs, [str(i.name) for i in walk.loaded.get_inputs()]), names)


class _Walk:
    """A file's optimized graph, node by node."""

    def __init__(self, model: bytes, arithmetic: Arithmetic) -> None:
        self.loaded = runtime.session(model)
        self.graph = runtime.optimized_model(model)
        self.kernels = kernels_of(arithmetic)
        self.outputs = [str(one.name) for one in self.graph.graph.output]
        self.opset = {o.domain: o.version for o in self.graph.opset_import}
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.graph.graph.initializer}
        self.last = {name: node for node in self.graph.graph.node for name in node.input}
        self.floats: dict[str, Callable[[Values], list[Array]]] = {}

    def values(self, inputs: Mapping[str, Array], names: Iterable[str]) -> Values:
        """The named values, of one batch in the layout that the file takes."""
        wanted, known = set(names), {**self.constants, **inputs}
        for node in self.graph.graph.node:
            found = self._node(node, [known[name] if name else None for name in node.input], known)
            known |= {name: x for name, x in zip(node.output, found, strict=False) if name}
            for name in set(node.input) - wanted - self.constants.keys():
                if self.last[name] is node:
                    known.pop(name, None)
        return {name: known[name] for name in wanted}

    def _node(self, node: onnx.NodeProto, inputs: list[Array | None], known: Values) -> list[Array]:
        if node.op_type in self.kernels and supported(node, inputs):
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            result = self.kernels[node.op_type](inputs, attributes)
            return result if isinstance(result, list) else [result]
        if node.op_type in REFERENCED and not node.domain:
            return by_onnx(node, inputs, self.opset[""])
        key = str(node.output[0])
        if key not in self.floats:
            self.floats[key] = self._by_runtime(node, known)
        return self.floats[key](known)

    def _by_runtime(self, node: onnx.NodeProto, known: Values) -> Callable[[Values], list[Array]]:
        """A float operation as a model of its own."""
        stored = [t for t in self.graph.graph.initializer if t.name in set(node.input)]
        names = [n for n in dict.fromkeys(node.input) if n and n not in self.constants]
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(known[n].dtype), None)
            for n in names
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        domains = [helper.make_opsetid(d, v) for d, v in self.opset.items()]
        graph = helper.make_graph([node], "node", inputs, outputs, stored)
        model = helper.make_model(graph, opset_imports=domains, ir_version=self.graph.ir_version)
        loaded = runtime.session(model.SerializeToString(), optimize=False)

        def run(values: Values) -> list[Array]:
            return [np.asarray(x) for x in loaded.run(None, {n: values[n] for n in names})]

        return run
