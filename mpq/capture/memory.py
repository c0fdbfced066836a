"""What shares memory: a tensor that is overwritten under one name changes under its others.

A graph is a list of values, so writing into a part of a tensor becomes a new tensor (`with_item`),
and what else lies in the overwritten memory is read again from it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """What `tensor` is after `tensor[index] = value`, as a tensor of its own."""
    made = tensor.clone()
    made[index] = value
    return made


class Memory:
    """Which tensors lie in one storage, and which are views of which.

    All tensors are kept alive, so that neither an `id` nor an address is used twice.
    """

    def __init__(self) -> None:
        self._tenants: dict[int, list[Tensor]] = defaultdict(list)
        self._views: dict[int, tuple[Tensor, fx.Node]] = {}

    def add(self, tensor: Tensor) -> None:
        """Note a tensor."""
        tenants = self._tenants[_address(tensor)]
        if not any(t is tensor for t in tenants):
            tenants.append(tensor)

    def add_view(self, part: Any, whole: Any, node: fx.Node) -> None:
        """Note that `node` made `part` from `whole`, if they share memory."""
        both = isinstance(part, Tensor) and isinstance(whole, Tensor) and part is not whole
        if both and _address(part) and _address(part) == _address(whole):
            self._views[id(part)] = whole, node

    def view(self, part: Tensor) -> tuple[Tensor, fx.Node] | None:
        """The tensor that another was made from as a view, and by which node."""
        return self._views.get(id(part))

    def overlapping(self, tensor: Tensor) -> list[Tensor]:
        """Other tensors that share an element with this one."""
        others = [t for t in self._tenants[_address(tensor)] if t is not tensor]
        if not others or not _address(tensor):
            return []
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        touched = torch.zeros(size, dtype=torch.bool, device=tensor.device)
        _seen_as(touched, tensor).fill_(True)
        return [t for t in others if t.dtype != tensor.dtype or _seen_as(touched, t).any()]


def _address(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _seen_as(flags: Tensor, tensor: Tensor) -> Tensor:
    """Flags per element of a storage, in the shape of a tensor that lies in it."""
    return flags.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
