"""Hooks that are gone again, whatever happens, when their block ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove what `register_forward_hook` and the like returned when the block ends.

    Given a generator, hooks that were placed before one that could not be are removed as well:

        with hooked(m.register_forward_hook(look) for m in modules):
            model(images)
    """
    with ExitStack() as placed:
        for handle in handles:
            placed.callback(handle.remove)
        yield
