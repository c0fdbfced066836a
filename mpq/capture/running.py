"""Run a network as it is written, and leave it as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def as_written() -> Iterator[None]:
    """No compiled code and no fused encoder layers, which a mode cannot look into."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), _eager():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _eager() -> Iterator[None]:
    """Nothing runs compiled; the compiler, which takes 2 s to load, is told so if it is there."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    compiler, written = torch.compile, lambda model=None, **_: model or (lambda found: found)
    torch.compile = written  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put the buffers back to what they are now, whatever a forward does to them."""
    before = [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for owner, name, buffer, values in before:
            if buffer.shape == values.shape and buffer.device == values.device:
                buffer.data.copy_(values)
            owner._buffers[name] = buffer
