"""`QuantLayer`: a Conv or Linear with quantized weights, and its frozen form.

A layer with a `source` (the quantizer of its input) multiplies integers, as does a `dynamic` one,
which rounds its input to the range that it finds; any other runs in float on weights that are
stored as integers. All are exact statements of what the exported file does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mpq.numerics import TINY, choose_qparams, fake_quantize, quantize
from mpq.quant import ops
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.lsq import learned_fake_quantize
from mpq.quant.norm import LiveNorm
from mpq.quant.operation import LayerOp, integer_bias
from mpq.spec import DYNAMIC, ROUNDED_16, QuantSpec

FloatLayer = nn.Linear | nn.modules.conv._ConvNd
"""What can become a `QuantLayer`."""


def float_layer(module: nn.Module) -> FloatLayer:
    """A module that is known to be a Conv, ConvTranspose or Linear, as such."""
    assert isinstance(module, FloatLayer)
    return module


M_co = TypeVar("M_co", covariant=True)


@dataclass(frozen=True)
class Reference(Generic[M_co]):
    """A module that is used here and belongs elsewhere: no child, and not in the state dict."""

    module: M_co


class Constants(NamedTuple):
    """A layer as it is evaluated: integer weights, their scales, and the float bias."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None


class QuantLayer(nn.Module):
    """A Conv, ConvTranspose or Linear with learned weight steps.

    A `norm` that follows it belongs to it: it is part of the scales and the bias in eval mode.

    Args:
        layer: the float layer; its parameters are taken over, not copied.
        spec: signed weight format.
        source: the quantizer of the input, for integer arithmetic; None for float arithmetic.
        dynamic: a Linear without a source that rounds its input to the range of what comes.
    """

    def __init__(
        self, layer: nn.Module, spec: QuantSpec, source: FakeQuant | None, *, dynamic: bool = False
    ) -> None:
        super().__init__()
        self.op, self.spec, self.dynamic = LayerOp.of(layer), spec, dynamic
        self.goal = spec  # the policy's format; `spec` is wider while training lowers it in stages
        given = float_layer(layer)
        assert isinstance(given.weight, nn.Parameter)
        assert given.bias is None or isinstance(given.bias, nn.Parameter)
        self.weight: nn.Parameter = given.weight
        self.bias: nn.Parameter | None = given.bias
        self.norm: LiveNorm | None = None
        self.enabled = True
        self._source = Reference(source)
        flat = self._channels(self.weight.detach())
        scale, _ = choose_qparams(flat.amin(1), flat.amax(1), spec)
        self.scale = nn.Parameter(scale if spec.granularity == "channel" else scale.amax())

    @property
    def source(self) -> FakeQuant | None:
        """The quantizer of the input, if the layer runs as integers."""
        return self._source.module

    def _channels(self, weight: Tensor) -> Tensor:
        return weight.transpose(0, self.op.axis).flatten(1)

    def step(self) -> Tensor:
        """The effective weight scales: positive."""
        return self.scale.abs().clamp(min=TINY)

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Take weight scales, shaped like `scale`, raised to what `least_step` allows."""
        self.scale.copy_(torch.maximum(scale.abs(), self.least_step()))

    def integers(self) -> Tensor:
        """The weights as stored: int8, or int16 at 16 bits."""
        return self.constants().weight

    @torch.no_grad()
    def constants(self) -> Constants:
        """What eval mode and the frozen layer compute with."""
        factor, bias = self._affine()
        step = torch.maximum(self.step(), self._floor(factor, bias))
        zero = torch.zeros_like(step)
        q = quantize(self.weight, step, zero, self.spec, self.op.axis)
        stored = q.to(torch.int16 if self.spec.bits > 8 else torch.int8)
        scale = step if factor is None else step * factor
        return Constants(stored, scale, None if bias is None else bias.detach())

    @torch.no_grad()
    def least_step(self) -> Tensor:
        """Steps with which the integer bias stays below 2^30, shaped like `scale`.

        A channel whose weights have died still has its bias, and in eval mode its scale carries it.
        """
        return self._floor(*self._affine())

    def _floor(self, factor: Tensor | None, bias: Tensor | None) -> Tensor:
        """`least_step`, given what `_affine` gives."""
        if bias is None or self.source is None:
            return torch.zeros_like(self.scale)
        floor = bias.abs() / (self.source.step() * 2.0**30)
        floor = floor if factor is None else floor / factor
        return floor if self.scale.ndim else floor.amax()

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """What a channel of the bare layer is multiplied by, if anything, and what is added."""
        if self.norm is None:
            return None, self.bias
        return self.norm.affine()

    @torch.no_grad()
    def absorb_norm(self) -> None:
        """Take the norm into weights, steps and bias for good; eval mode answers as before."""
        if self.norm is None:
            return
        found = self.constants()
        self.weight.copy_(ops.dequantize(found.weight, found.scale, self.op.axis))
        assert found.bias is not None
        self.bias, self.norm = nn.Parameter(found.bias.clone()), None
        self.set_scale(found.scale)

    def frozen(self) -> FrozenLayer:
        """This layer as constants."""
        return FrozenLayer(self)

    def forward(self, x: Tensor) -> Tensor:
        """Training: learned fake quantization. Eval: exactly what the frozen layer does."""
        if not self.enabled:
            return self._normed(self.op.float(x, self.weight, self.bias))
        if self.training:
            scale, axis = self.step(), self.op.axis
            zero, count = torch.zeros_like(scale), self.weight.numel() // scale.numel()
            weight = learned_fake_quantize(
                self.weight, scale, zero, self.spec, axis=axis, count=count
            )
            x = _on_own_grid(x) if self.dynamic else x
            return self._normed(self.op.float(x, weight, self.bias))
        found, source = self.constants(), self.source
        if self.dynamic:
            return ops.dynamic_linear(x, *found)
        if source is None or not source.enabled:
            weight = ops.dequantize(found.weight, found.scale, self.op.axis)
            return self.op.float(x, weight, found.bias)
        x_scale = source.step().detach()
        bias = None if found.bias is None else integer_bias(found.bias, x_scale * found.scale)
        return self.op.integer(x, x_scale, found.weight, found.scale, bias)

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def extra_repr(self) -> str:
        """The operation and format, for `print(module)`."""
        integer = "dynamic integer" if self.dynamic else "integer" if self.source else "float"
        return f"{self.op.kind}, {self.spec}, {integer} arithmetic"


def _on_own_grid(x: Tensor) -> Tensor:
    """`x` rounded to the grid of its range; the gradient passes straight through."""
    seen = x.detach().float()
    step, zero = choose_qparams(seen.amin(), seen.amax(), DYNAMIC)
    return x + (fake_quantize(seen, step, zero, DYNAMIC) - seen)


class FrozenLayer(nn.Module):
    """A `QuantLayer` as constants: integer weights, scales, and an int32 bias where it runs so."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    x_scale: Tensor | None

    def __init__(self, layer: QuantLayer) -> None:
        super().__init__()
        self.op, self.spec, self.dynamic = layer.op, layer.spec, layer.dynamic
        found = layer.constants()
        x_scale = None if layer.source is None else layer.source.step().detach().clone()
        bias = found.bias if found.bias is None else found.bias.clone()
        if bias is not None and x_scale is not None:
            bias = integer_bias(bias, x_scale * found.scale)
        self.register_buffer("weight", found.weight)
        self.register_buffer("scale", found.scale.clone())
        self.register_buffer("bias", bias)
        self.register_buffer("x_scale", x_scale)

    @property
    def interleaves(self) -> bool:
        """Whether it is a transposed convolution on integers, with a stride."""
        transposed = self.op.kind == "conv_transpose" and self.x_scale is not None
        return transposed and max(self.op.stride) > 1

    def forward(self, x: Tensor) -> Tensor:
        """Integer arithmetic if the input is quantized, else float on expanded weights."""
        if self.dynamic:
            return ops.dynamic_linear(x, self.weight, self.scale, self.bias)
        if self.x_scale is not None:
            return self.op.integer(x, self.x_scale, self.weight, self.scale, self.bias)
        weight = ops.dequantize(self.weight, self.scale, self.op.axis)
        return self.op.float(x, weight, self.bias)


class IslandLayer(nn.Module):
    """A quantized layer inside a module that cannot be traced: it brings its own quantizers.

    Args:
        input: quantizes what comes in, or passes it on.
        layer: the quantized layer, or its frozen form.
        output: quantizes what goes out, or passes it on.
    """

    def __init__(self, input: nn.Module, layer: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.input, self.layer, self.output = input, layer, output

    @classmethod
    def of(cls, layer: nn.Module, spec: QuantSpec, activation: QuantSpec | None) -> IslandLayer:
        """Quantize a float layer.

        Args:
            layer: the float layer.
            spec: weight format.
            activation: input format, None for float arithmetic; a convolution's output takes it
                too, because the integer kernel writes integers. At 16 bits the input alone is
                rounded, for float arithmetic.
        """
        dynamic, wide = activation == DYNAMIC, activation == ROUNDED_16
        quantizer = None if activation is None or dynamic else FakeQuant(activation)
        source = None if wide else quantizer
        after = activation is not None and not wide and not isinstance(layer, nn.Linear)
        return cls(
            quantizer or nn.Identity(),
            QuantLayer(layer, spec, source, dynamic=dynamic),
            FakeQuant(activation) if activation is not None and after else nn.Identity(),
        )

    def frozen(self) -> IslandLayer:
        """This layer as constants."""
        return IslandLayer(*(_frozen(part) for part in (self.input, self.layer, self.output)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize, run, quantize."""
        out: Tensor = self.output(self.layer(self.input(x)))
        return out


def _frozen(part: nn.Module) -> nn.Module:
    return part.frozen() if isinstance(part, (FakeQuant, QuantLayer)) else part
