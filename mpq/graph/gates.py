"""Write gated activations as the products that they are, so that each factor can be an integer.

`silu(x) = x sigmoid(x)` and `hardswish(x) = x hardsigmoid(x)`: a runtime has integer kernels for
the gate and for the product, but none for the activation as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.sigmoid, "hardswish": F.hardsigmoid}


def open_gates(qg: QuantGraph) -> int:
    """Replace each SiLU and hard-swish by gate and product; return how many there were."""
    modules = dict(qg.module.named_modules(remove_duplicate=False))
    count = 0
    for node in list(qg.module.graph.nodes):
        gate = GATES.get(kind_of(node, modules))
        if gate is None:
            continue
        x = node.args[0]
        assert isinstance(x, fx.Node)
        with qg.module.graph.inserting_before(node):
            factor = qg.module.graph.call_function(gate, (x,))
            product = qg.module.graph.call_function(operator.mul, (x, factor))
        node.replace_all_uses_with(product)
        qg.module.graph.erase_node(node)
        count += 1
    return count
