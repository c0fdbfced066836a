"""Replace every quantizer and quantized layer by its constants: the graph that is exported.

Frozen equals prepared in eval mode bit for bit, because both run the same operators.
"""

from __future__ import annotations

from mpq.errors import GraphError
from mpq.graph.ir import QuantGraph
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import IslandLayer, QuantLayer


def freeze(qg: QuantGraph) -> int:
    """Freeze in place; return the number of modules replaced.

    Raises:
        GraphError: a quantizer still passes floats through (calibration was not finished).
    """
    qg.module.eval()
    named = list(qg.module.named_modules())
    for name, module in named:
        if isinstance(module, (FakeQuant, QuantLayer)) and not module.enabled:
            raise GraphError(
                f"{name} must be switched on before freezing, but it passes floats through. "
                "Calibrate the graph (mpq.ptq.calibrate) first."
            )
    count = 0
    # Layers first: they read the steps of the quantizers that are replaced after them.
    for kind in (IslandLayer, QuantLayer, FakeQuant):
        for name, module in named:
            if isinstance(module, kind) and not _inside_island(name, named):
                qg.module.set_submodule(name, module.frozen())
                count += 1
    qg.module.requires_grad_(False)
    return count


def _inside_island(name: str, named: list[tuple[str, object]]) -> bool:
    islands = (n for n, m in named if isinstance(m, IslandLayer))
    return any(name.startswith(f"{n}.") for n in islands)
