"""A copy of a network that can be run, rewritten and captured, without a trace of earlier runs.

Wrappers are opened (DataParallel, DistributedDataParallel, torch.compile), and weights that are
computed before each run (weight norm, spectral norm, pruning, parametrizations) become the plain
weights that they stand for.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from mpq.errors import GraphError

logger = logging.getLogger(__name__)
_WRAPPED = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Wrappers of torch's own, and the name of the child that they call."""


def fresh(model: nn.Module) -> nn.Module:
    """An independent copy in eval mode.

    What eval mode has cached is forgotten: `train()` is where such modules drop it.

    Raises:
        GraphError: the network cannot be copied.
    """
    model = _inside(model)
    try:
        made = copy.deepcopy(model, _without_history(model))
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise GraphError(
            f"{type(model).__name__} must be a network that copy.deepcopy can copy, but: {why}. "
            "Keep what cannot be copied (files, locks, generators) out of the module."
        ) from error
    _open_wrappers(made)
    made.train().eval()
    plain_weights(made)
    return made


def _inside(model: nn.Module) -> nn.Module:
    """What a wrapper calls; the module itself where it is none."""
    child = _WRAPPED.get(type(model).__name__)
    if child is None or not type(model).__module__.startswith("torch."):
        return model
    return _inside(dict(model.named_children())[child])


def _open_wrappers(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _inside(child) is not child:
                setattr(parent, name, _inside(child))


def _without_history(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy`, which refuses tensors that remember how they were computed.

    A module that keeps a feature map, or a weight made by a hook, holds one.
    """
    values = [v for m in model.modules() for v in vars(m).values()]
    kept = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor) and not t.is_leaf]
    return {id(t): t.detach().clone() for t in kept}


def plain_weights(model: nn.Module) -> int:
    """Make computed weights plain, in place; return how many."""
    count = 0
    for path, module in model.named_modules():
        for name, how in (*_parametrized(module), *_hooked(module)):
            logger.info("%s.%s is computed by %s: taken as the weight that it is", path, name, how)
            count += 1
    return count


def _parametrized(module: nn.Module) -> list[tuple[str, str]]:
    if not parametrize.is_parametrized(module):
        return []
    made = []
    _with_own_class(module)
    for name, steps in list(module.parametrizations.items()):  # type: ignore[union-attr,operator]
        made.append((name, ", ".join(type(step).__name__ for step in steps)))
        with torch.enable_grad():  # the result is a parameter if its parts asked for gradients
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return made


def _with_own_class(module: nn.Module) -> None:
    """A parametrization is a property of the class, which a copy shares with the original."""
    kind = type(module)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)


def _hooked(module: nn.Module) -> list[tuple[str, str]]:
    made = []
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        else:
            continue
        made.append((getattr(hook, "name", "weight"), type(hook).__name__))
    return made
