"""Build a network for the names and shapes of its weights alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_INITIALIZERS = (
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.fill_,
    Tensor.zero_,
    Tensor.erfinv_,
    Tensor.clamp_,
    Tensor.mul_,
    Tensor.add_,
    nn.init.constant_,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
)


class WithoutMemory(TorchFunctionMode):
    """Put `torch.empty` on the meta device: weights have shapes only, constants stay real.

    `with torch.device("meta")` would take the constants as well, and some networks compute
    their widths or attention windows from them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        target = args[0] if args else options.get("tensor")  # as torch.nn.init passes it on
        if func in _INITIALIZERS and isinstance(target, Tensor) and target.is_meta:
            return target  # such a call on a meta tensor is slow, and the first imports for seconds
        return func(*args, **options)
