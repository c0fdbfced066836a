"""Where a forward pass first leaves the finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpq.hooks import hooked


@dataclass(frozen=True, slots=True)
class Nonfinite:
    """The module that gave the first NaN or infinity: its path, its type, and what is known."""

    name: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.kind}): {self.why}"


def first_nonfinite(
    modules: Mapping[str, nn.Module], forward: Callable[[], object]
) -> Nonfinite | None:
    """Run `forward` with a hook on each of the modules; describe the first bad output.

    Inner modules finish before the modules that hold them, so of nested ones the first reported is
    the smallest. None if all outputs are finite.
    """
    found: list[Nonfinite] = []
    hooks = (m.register_forward_hook(_hook(name, found)) for name, m in modules.items())
    with hooked(hooks), torch.no_grad():
        forward()
    return found[0] if found else None


def _hook(name: str, found: list[Nonfinite]) -> Callable[[nn.Module, object, object], None]:
    def check(module: nn.Module, inputs: object, output: object) -> None:
        if found or _finite(output):
            return
        bad = [n for n, p in module.named_parameters(recurse=False) if not _finite(p)]
        if bad:
            why = f"its {', '.join(bad)} became non-finite in an earlier step"
        elif not _finite(inputs):
            why = "its input is non-finite already (a function outside of any module made it)"
        else:
            why = "its input and parameters are finite"
        found.append(Nonfinite(name, type(module).__name__, why))

    return check


def _finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return True
