"""Open attention modules whose matrix products are hidden, so that they are layers like others.

`nn.MultiheadAttention` and torchvision's shifted window attention hand the weights of their
projections to one function, out of reach of tracing and of quantization. Each is replaced by a
module that computes the same with two `nn.Linear` of its own: the projection to queries, keys and
values and the projection back. What lies between them has no integer kernel and stays in float:
`softmax(Q K^T / sqrt(d) + B) V` (Vaswani et al., "Attention Is All You Need", 2017; windows and
position bias B: Liu et al., "Swin Transformer", 2021; with cosines in place of products: "Swin
Transformer V2", 2022).

Sizes are read from one run of the example, so that the traced graph has no branch on shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.capture.network import Network
from mpq.capture.running import as_written, unchanged
from mpq.hooks import hooked

_WINDOWED = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
MAX_LOGIT_SCALE = math.log(100.0)


def open_attention(network: Network) -> int:
    """Replace the attention modules of a network, in place; return how many.

    Args:
        network: in eval mode.
    """
    model = network.module
    found = {n: m for n, m in model.named_modules() if _windowed(m) or _self_attention(m)}
    if not found:
        return 0
    calls = _calls(network, found)
    count = 0
    for name, module in found.items():
        args = calls.get(name)
        if args is None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            if not (len(args) == 3 and args[0] is args[1] is args[2]):
                continue  # attention to something else than itself
            model.set_submodule(name, SelfAttention(module))
        else:
            model.set_submodule(name, WindowAttention(module, tuple(args[0].shape[1:3])))
        count += 1
    return count


def _windowed(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torchvision.") and kind.__name__ in _WINDOWED


def _self_attention(module: nn.Module) -> bool:
    return (
        type(module) is nn.MultiheadAttention
        and module.batch_first
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


@torch.no_grad()
def _calls(network: Network, modules: dict[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """The arguments of each module's only call; masked or repeated calls are left out."""
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            masks = [value for key, value in kwargs.items() if key != "need_weights"]
            plain = all(value is None or value is False for value in masks)
            calls[name].append(args if plain else ())

        return hook

    watching = hooked(
        module.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, module in modules.items()
    )
    try:
        with watching, unchanged(network.module), as_written():
            network.module(*network.args, **network.kwargs)
    except Exception:  # recording says what is wrong with the network or the example
        return {}
    return {name: made[0] for name, made in calls.items() if len(made) == 1 and made[0]}


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence `[N, L, E]` to itself, without masks."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attention.in_proj_weight is not None
        self.heads, self.width = attention.num_heads, attention.head_dim
        self.batch_first = True  # an encoder asks
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **none: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Only `query` is read; the others are the same tensor, and no mask is given."""
        qkv = self.in_proj(query).unflatten(-1, (3, self.heads, self.width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax((q * self.width**-0.5) @ k.transpose(-2, -1), dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), (
            weights.mean(1) if need_weights else None
        )


class WindowAttention(nn.Module):
    """Attention within shifted windows of an image `[N, H, W, C]` of one size.

    Args:
        attention: torchvision's `ShiftedWindowAttention` or its second version.
        size: H and W.
    """

    mask: Tensor | None
    logit_scale: Tensor | None

    def __init__(self, attention: Any, size: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.size, self.window = size, tuple(attention.window_size)
        self.grid = tuple(-(-s // w) for s, w in zip(size, self.window, strict=True))
        # A window as large as the image is not shifted.
        self.shift = tuple(
            s if n > 1 else 0 for s, n in zip(attention.shift_size, self.grid, strict=True)
        )
        cosine = hasattr(attention, "logit_scale")
        self.qkv = _linear(attention.qkv.weight, _query_key_value_bias(attention, cosine))
        self.proj = _linear(attention.proj.weight, attention.proj.bias)
        with torch.no_grad():
            bias = attention.get_relative_position_bias()
            scale = attention.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp() if cosine else None
        self.position_bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("logit_scale", scale)
        self.register_buffer("mask", self._mask() if any(self.shift) else None)

    def _mask(self) -> Tensor:
        """`[windows, 1, P, P]`: -100 between places that only the shift made neighbours."""
        rows, columns = (
            torch.bucketize(torch.arange(n * w), torch.tensor([n * w - w, n * w - s]), right=True)
            for n, w, s in zip(self.grid, self.window, self.shift, strict=True)
        )
        regions = (rows[:, None] * 3 + columns[None, :]).float()
        flat = self._partition(regions[None, :, :, None], 1).squeeze(-1)
        return (flat[:, None] != flat[:, :, None]).float().mul(-100.0).unsqueeze(1)

    def _partition(self, x: Tensor, channels: int) -> Tensor:
        """`[N, H, W, C]` to `[N windows, P, C]`, P the places of a window."""
        (rows, columns), (high, wide) = self.grid, self.window
        x = x.reshape(-1, rows, high, columns, wide, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, high * wide, channels)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.logit_scale is None:
            scores = (q * (self.proj.in_features // self.heads) ** -0.5) @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * self.logit_scale
        scores = scores + self.position_bias
        if self.mask is not None:
            places, windows = self.window[0] * self.window[1], self.grid[0] * self.grid[1]
            scores = scores.reshape(-1, windows, self.heads, places, places) + self.mask
            scores = scores.reshape(-1, self.heads, places, places)
        return torch.softmax(scores, dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        """Pad, shift, cut into windows, attend, and back."""
        (height, width), (rows, columns), (high, wide) = self.size, self.grid, self.window
        channels = self.proj.in_features
        padded = rows * high - height, columns * wide - width
        if any(padded):
            x = F.pad(x, (0, 0, 0, padded[1], 0, padded[0]))
        if any(self.shift):
            x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        qkv = self.qkv(self._partition(x, channels))
        qkv = qkv.reshape(-1, high * wide, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = self._attend(q, k, v).transpose(1, 2).reshape(-1, high * wide, channels)
        out = self.proj(out).reshape(-1, rows, columns, high, wide, channels)
        out = out.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * high, columns * wide, channels)
        if any(self.shift):
            out = torch.roll(out, self.shift, (1, 2))
        return out[:, :height, :width] if any(padded) else out


def _query_key_value_bias(attention: Any, cosine: bool) -> Tensor | None:
    """The bias of the projection; with cosines, keys have none."""
    bias: Tensor | None = attention.qkv.bias
    if bias is None or not cosine:
        return bias
    queries, keys, values = bias.detach().chunk(3)
    return torch.cat((queries, torch.zeros_like(keys), values))
