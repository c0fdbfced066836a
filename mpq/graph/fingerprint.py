"""What a graph computes as one hash: its operations, their options, and every tensor it reads."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn

from mpq.checkpoint import weights_hash
from mpq.graph.ir import QuantGraph

_PLAIN = (bool, int, float, str, tuple, type(None))


def fingerprint(qg: QuantGraph) -> str:
    """SHA-256 over all nodes and tensors; equal graphs have equal ones, in any process."""
    module = qg.module
    tensors: dict[str, Tensor] = {**module.state_dict(), **dict(module.named_buffers())}
    digest = hashlib.sha256()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            tensors[str(node.target)] = getattr(module.get_submodule(owner), name)
        target = node.target if isinstance(node.target, str) else _name(node.target)
        digest.update(f"{node.name} {node.op} {target} {node.args} {node.kwargs}\n".encode())
        if node.op == "call_module":
            for path, child in module.get_submodule(str(node.target)).named_modules():
                digest.update(f"{path} {_options(child)}\n".encode())
    digest.update(weights_hash(tensors).encode())
    return digest.hexdigest()


def _name(function: Any) -> str:
    home = getattr(function, "__module__", "")
    return f"{home}.{getattr(function, '__qualname__', getattr(function, '__name__', function))}"


def _options(module: nn.Module) -> str:
    kept = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}
    return f"{_name(type(module))} {sorted(kept.items())}"
