"""`Network`: a module and how it is called."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpq.calls import Inputs, leaves, nested, refill
from mpq.errors import GraphError, nearest
from mpq.inputs import InputSpec, InputSpecs


@dataclass(frozen=True, eq=False)
class Network:
    """A module with an example call.

    Args:
        module: any network; it is not changed.
        args: positional arguments of an example call, any nesting of tensors and plain values.
        kwargs: its keyword arguments.

    Raises:
        GraphError: the example does not fit the signature, or holds no tensor.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = type(self.module).__name__
        if not any(isinstance(v, Tensor) for v in pytree.tree_leaves((self.args, self.kwargs))):
            raise GraphError(f"the example call of {name} must hold a tensor. Got none.")
        try:
            inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            signature = f"{name}.forward{inspect.signature(self.module.forward)}"
            raise GraphError(
                f"the example call must fit {signature}: {error}"
                f"{self._meant()} Got {len(self.args)} positional arguments and keywords "
                f"{list(self.kwargs)}. Give each argument that has no default, by its name "
                "(--input-shape NAME=SIZES:DTYPE for each)."
            ) from None

    def _meant(self) -> str:
        """The names that an unknown one may stand for."""
        known = inspect.signature(self.module.forward).parameters
        unknown = next((name for name in self.kwargs if name not in known), None)
        return "." if unknown is None else nearest(unknown, known) or "."

    @property
    def arguments(self) -> dict[str, Any]:
        """The values given, by the name of their parameter, in the order of the call."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self.module.forward).parameters.values()
        names = [p.name for p in parameters if p.kind in kinds]
        names += [f"arg_{i}" for i in range(len(names), len(self.args))]
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments that hold a tensor: what a captured graph takes, in this order."""
        return {name: value for name, value in self.arguments.items() if holds_tensor(value)}

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that hold none, defaults included: a capture keeps them as they are."""
        bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return {name: v for name, v in bound.arguments.items() if not holds_tensor(v) and v != ()}

    @property
    def batch(self) -> int | None:
        """The first size that most tensors share; None where none has two dimensions."""
        leaves = pytree.tree_leaves(self.inputs)
        sizes = [v.shape[0] for v in leaves if isinstance(v, Tensor) and v.ndim > 1]
        return Counter(sizes).most_common(1)[0][0] if sizes else None

    @classmethod
    def of(cls, module: nn.Module, example: Inputs | Network) -> Network:
        """A module called with an example: a tensor, a tuple of arguments or a dict of keywords.

        Raises:
            GraphError: the example is none of these, does not fit the signature, or holds no
                tensor.
        """
        if isinstance(example, Network):
            return cls(module, example.args, example.kwargs)
        if isinstance(example, dict):
            return cls(module, (), example)
        if not isinstance(example, (Tensor, tuple)):
            raise GraphError(
                "the example must be a tensor, a tuple of positional arguments, a dict of keyword "
                f"arguments or a Network. Got {type(example).__name__}."
            )
        return cls(module, example if isinstance(example, tuple) else (example,))

    @property
    def example(self) -> Inputs:
        """The inputs as a captured graph is called: a lone tensor by position, else by name."""
        inputs = self.inputs
        lone = len(inputs) == 1 and not self.kwargs
        first = next(iter(inputs.values()))
        return first if lone and isinstance(first, Tensor) else inputs

    @classmethod
    def of_specs(cls, module: nn.Module, specs: InputSpecs, samples: int = 2) -> Network:
        """A module called with noise of these inputs, by name; one without a name comes first.

        Raises:
            GraphError: they do not fit the signature.
        """
        tensors = {
            name: torch.from_numpy(np.stack([spec.noise((i,)) for i in range(samples)]))
            for name, spec in specs.items()
        }
        if list(tensors) == [""]:
            return cls(module, (tensors[""],))
        return cls(module, (), nested(tensors))

    @property
    def specs(self) -> dict[str, InputSpec]:
        """Its tensors by name, without the batch.

        Raises:
            UsageError: a tensor of a type that no file can take.
        """
        return {name: InputSpec.of(t) for name, t in leaves(self.example, "input").items()}

    def answer(self, inputs: Inputs) -> Any:
        """What the module answers to other inputs, with all else as in the example."""
        given = leaves(inputs).values()
        args, kwargs = refill((self.args, self.kwargs), given)
        return self.module(*args, **kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Network:
        """The same call with every tensor changed."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Network(self.module, args, kwargs)


def holds_tensor(value: Any) -> bool:
    """Whether a nesting of values holds a tensor."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def check_module(module: nn.Module) -> None:
    """Refuse what no pass can work on: scales and integers follow from known float32 weights.

    Raises:
        GraphError: TorchScript, weights of another precision, or weights that are not finite.
    """
    kind = type(module).__name__
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise GraphError(
                f"{kind} must be a Python module. Got TorchScript{f' as {name}' if name else ''}, "
                "whose operations no public function of torch gives. Give the module that was "
                "scripted or traced."
            )
    for name, weight in module.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise GraphError(
                f"the weights of {kind} must be float32. Got {name} as "
                f"{str(weight.dtype).removeprefix('torch.')}. Call .float() on the model, which "
                "loses nothing, and give it float32 inputs."
            )
        if name.endswith(("weight", "bias")) and not bool(torch.isfinite(weight).all()):
            raise GraphError(
                f"the weights of {kind} must be finite. {name} holds NaN or infinity: the "
                "checkpoint is damaged or its training diverged."
            )
