"""Attention of any rank, which the exporter takes for tensors of four dimensions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.graph.ir import QuantGraph
from mpq.graph.shapes import ranks


def open_products(qg: QuantGraph) -> int:
    """Write out attention over tensors of other than four dimensions; return how many there were.

    Windows and units of masks (timm's NesT and Hiera) make it five.
    """
    found = [n for n in qg.module.graph.nodes if n.target is F.scaled_dot_product_attention]
    dimensions = ranks(qg) if found else {}
    found = [n for n in found if dimensions.get(n.all_input_nodes[0].name) != 4]
    for node in found:
        node.target = scaled_dot_product_attention
    return len(found)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What torch's function of this name gives, by products and softmax.

    Args:
        query: `[..., L, E]`.
        key: `[..., S, E]`.
        value: `[..., S, V]`.
        attn_mask: added to `query @ key^T` where it holds floats; where it holds truths, the false
            ones take no part.
        dropout_p: of training; not used.
        is_causal: whether each query sees no key after its own place.
        scale: of the products; None: `1 / sqrt(E)`.

    Returns:
        `[..., L, V]`.
    """
    products = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    if is_causal:
        attn_mask = torch.ones_like(products, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        products = products.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        products = products + attn_mask
    return products.softmax(-1) @ value
