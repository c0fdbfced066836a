"""Activations of both signs become ReLUs over two halves, so that nothing is quantized before them.

An integer convolution rounds its output, and rounds it again after a PReLU, which no runtime fuses.
With slopes `a` a PReLU is

    f(x) = relu(x) - a relu(-x) = relu(x) - sign(a) relu(-|a| x)

so the convolution before it writes both halves (weights `w` and `-|a| w`), a ReLU is the saturation
of its quantizer, and the layer after it reads them with `W` and `-sign(a) W`: the same function,
rounded once, in steps half as wide as one scale for both signs has. A LeakyReLU is the same with
one slope, and no activation at all with slope 1. It costs channels: up to twice as many.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

LAYERS = (nn.Conv2d, nn.ConvTranspose2d)


@torch.no_grad()
def split_signs(network: nn.Module, *, linear: bool = True, least: float = 1e-2) -> fx.GraphModule:
    """A copy of a network whose chains of convolutions are split so.

    Args:
        network: in float; chains are convolutions with one reader each.
        linear: also where there is no activation between them.
        least: slopes nearer to 0 are taken for 0, whose half is left out.
    """
    found = fx.symbolic_trace(copy.deepcopy(network))
    parts = dict(found.named_modules())
    for first in list(found.graph.nodes):
        chain = _chain(first, parts)
        if chain is None or (len(chain) == 2 and not linear):
            continue
        writer, reader = parts[chain[0].target], parts[chain[-1].target]
        slopes = _slopes(parts[chain[1].target], len(writer.weight))
        kept = (slopes.abs() >= least).nonzero().flatten()
        other = slopes[kept]
        factor = -other.abs().reshape(-1, 1, 1, 1)
        _take(writer, torch.cat([writer.weight, writer.weight[kept] * factor]))
        writer.bias = nn.Parameter(torch.cat([writer.bias, writer.bias[kept] * factor.flatten()]))
        axis = 0 if isinstance(reader, nn.ConvTranspose2d) else 1
        read = reader.weight.index_select(axis, kept)
        signs = -other.sign().reshape([-1, 1, 1, 1] if axis == 0 else [1, -1, 1, 1])
        _take(reader, torch.cat([reader.weight, read * signs], axis))
        with found.graph.inserting_after(first):
            relu = found.graph.call_function(torch.relu, (first,))
        chain[-1].replace_input_with(chain[-2], relu)
        if len(chain) == 3:
            found.graph.erase_node(chain[1])
    found.delete_all_unused_submodules()
    found.recompile()
    return found.eval()


def _chain(node: fx.Node, parts: dict[str, nn.Module]) -> list[fx.Node] | None:
    """A convolution, an activation or none, and the convolution that alone reads it."""
    if type(parts.get(str(node.target))) is not nn.Conv2d or parts[str(node.target)].bias is None:
        return None
    chain = [node]
    while len(chain) < 3 and len(chain[-1].users) == 1:
        chain.append(next(iter(chain[-1].users)))
        part = parts.get(str(chain[-1].target)) if chain[-1].op == "call_module" else None
        if isinstance(part, LAYERS):
            plain = part.groups == parts[str(node.target)].groups == 1
            return chain if plain else None
        if not isinstance(part, nn.PReLU | nn.LeakyReLU):
            return None
    return None


def _slopes(activation: nn.Module, channels: int) -> Tensor:
    """`[C]` of a PReLU or LeakyReLU, ones of anything else."""
    if isinstance(activation, nn.PReLU):
        return activation.weight.detach().expand(channels)
    return torch.full((channels,), getattr(activation, "negative_slope", 1.0))


def _take(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer other weights, and the numbers of channels that go with them."""
    layer.weight = nn.Parameter(weight)
    one, other = weight.shape[:2]
    transposed = isinstance(layer, nn.ConvTranspose2d)
    layer.in_channels, layer.out_channels = (one, other) if transposed else (other, one)
