"""Under which name a call enters the graph: the one that `torch.fx.symbolic_trace` would give it.

A mode sees operators as methods of the tensor (`x + y` as `Tensor.add`); in the graph they are
Python's operators, whoever wrote them how.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.capture.overloads import in_python

Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""Opcode, target, arguments and keywords of a node."""

_UNARY = {"neg": operator.neg, "__invert__": operator.invert}
_BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "true_divide": operator.truediv,
    "__floordiv__": operator.floordiv,
    "remainder": operator.mod,
    "__mod__": operator.mod,
    "pow": operator.pow,
    "__pow__": operator.pow,
    "matmul": operator.matmul,
    "__matmul__": operator.matmul,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "__xor__": operator.xor,
    "__getitem__": operator.getitem,
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}
_SWAPPED = {
    "__rsub__": operator.sub,
    "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv,
    "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv,
    "__rmod__": operator.mod,
    "__rmatmul__": operator.matmul,
}
_OVERWRITING = {"add_", "sub_", "mul_", "div_", "pow_", "remainder_"}

VALUES = frozenset(
    {f"__{name}__" for name in ("bool", "int", "float", "index", "complex", "contains", "array")}
    | {"item", "tolist", "numpy", "is_nonzero", "equal", "allclose"}
)
"""Functions that turn what a tensor holds into Python values."""


_OVERLOADED = {"sym_size.int": "size", "sym_numel.default": "numel", "item.default": "item"}
"""What an exported program asks for by an operator of its own."""


def name_of(function: Callable[..., Any]) -> str:
    """A function's name; of a property that is read, the property's."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return str(function.__self__.__name__)  # type: ignore[attr-defined]
    return _OVERLOADED.get(name, str(name))


def is_property(function: Callable[..., Any]) -> bool:
    """Whether a call reads a property of a tensor."""
    return getattr(function, "__name__", "") == "__get__"


def is_random(function: Callable[..., Any]) -> bool:
    """Whether a call draws random numbers, so that its result is no constant."""
    name = name_of(function)
    return name.startswith("rand") or name in ("normal", "bernoulli", "multinomial", "poisson")


def call_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The node of a call that was seen."""
    if isinstance(function, torch._ops.OpOverload):
        return "call_function", *in_python(function, args, kwargs)
    name = name_of(function)
    if is_property(function):
        return "call_function", getattr, (args[0], name), {}
    if not _is_method(function, name):
        return "call_function", function, args, kwargs
    if not kwargs and len(args) == 1 and name in _UNARY:
        return "call_function", _UNARY[name], args, {}
    if not kwargs and len(args) == 2:
        if name in _SWAPPED:
            return "call_function", _SWAPPED[name], args[::-1], {}
        plain = name.removesuffix("_") if name in _OVERWRITING else name
        if plain in _BINARY:
            return "call_function", _BINARY[plain], args, {}
    return "call_method", name, args, kwargs


def _is_method(function: Callable[..., Any], name: str) -> bool:
    owner = getattr(function, "__qualname__", "").rpartition(".")[0]
    return owner in ("Tensor", "TensorBase") and hasattr(Tensor, name)


_OPENED = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)
"""Modules of torch that are made of others."""


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of a module is one node: it is torch's own, and nothing is hung on to it.

    What a user's hook does is recorded with the rest, and so is a padding that a convolution does
    beforehand because no runtime's convolution can.
    """
    home = type(module).__module__
    if not home.startswith(("torch.nn", "torch.ao.nn", "torch.jit")) or isinstance(module, _OPENED):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return getattr(module, "padding_mode", "zeros") == "zeros"


_QUESTIONS = {operator.getitem, getattr, operator.neg, math.ceil, math.floor} | {
    getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}


def is_question(node: fx.Node) -> bool:
    """Whether a node without readers is there only because Python asked or counted."""
    if node.op == "call_method":
        return node.target in ("size", "numel")
    return node.op == "get_attr" or (node.op == "call_function" and node.target in _QUESTIONS)
