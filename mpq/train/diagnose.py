"""Where a forward pass first leaves the finite numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` with a hook on every module of `model`; describe the first bad output.

    Inner modules finish before the modules that hold them, so the first one reported is the
    smallest. Returns an empty string if all outputs are finite.
    """
    found: list[str] = []
    handles = [
        module.register_forward_hook(_hook(name or "the model", found))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _hook(name: str, found: list[str]) -> Callable[[nn.Module, object, object], None]:
    def check(module: nn.Module, inputs: object, output: object) -> None:
        if found or _finite(output):
            return
        bad = [n for n, p in module.named_parameters(recurse=False) if not _finite(p)]
        kind = type(module).__name__
        if bad:
            why = f"its {', '.join(bad)} became non-finite in an earlier step"
        elif not _finite(inputs):
            why = "its input is non-finite already (a function outside of any module made it)"
        else:
            why = "its input and parameters are finite"
        found.append(f"{name} ({kind}): {why}")

    return check


def _finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return True
