"""`compile` of a recipe: the step's network through torch's compiler, and why that may not be.

Only what trains is compiled. Evaluation, checkpoints and export use the network itself, so the file
does not depend on the compiler, and teachers answer as without it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from mpq.errors import UsageError


def compiled(network: nn.Module, device: str) -> nn.Module:
    """`network` compiled for batches of one shape; it shares parameters and buffers.

    Raises:
        UsageError: there is no compiler for this device.
    """
    require_compiler(device)
    made: nn.Module = cast(Any, torch.compile(network, dynamic=False))
    return made


def require_compiler(device: str) -> None:
    """Refuse to compile where it would fail in the first step.

    Raises:
        UsageError: no C++ compiler for a CPU, no Triton for an accelerator.
    """
    missing = _missing_triton() if device == "cuda" else _missing_cpp()
    if missing:
        raise UsageError(
            f"compile needs {missing}. Install it, or leave --compile (compile: true) out: the "
            "same training, only slower."
        )


def _missing_cpp() -> str:
    from torch._inductor import cpp_builder  # the compiler: seconds of import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler such as g++ on the PATH or in CXX"
    return ""


def _missing_triton() -> str:
    from torch.utils._triton import has_triton

    return "" if has_triton() else "Triton for this accelerator"
