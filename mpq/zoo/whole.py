"""Networks that are one by themselves: folders, `.pt2` programs, and factories with weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpq._torchfile import is_exported
from mpq.calls import described
from mpq.capture.exported import open_exported
from mpq.capture.network import Network
from mpq.errors import CheckpointError, UsageError
from mpq.inputs import Shape
from mpq.trusted import is_name
from mpq.zoo.architectures import INPUT_SIZE
from mpq.zoo.builder import build, shaped, stated_inputs, stated_size
from mpq.zoo.fitting import Recognized
from mpq.zoo.folder import open_folder
from mpq.zoo.libraries import NAMES, declared_input


def open_whole(
    path: Path, arch: str | None, classes: int | None, takes: Shape | None
) -> Recognized | None:
    """The network under a path that is one by itself; None for a file of weights.

    Args:
        path: a folder of transformers or timm, a `.pt2` program, or `package.module:factory`.
        arch: an architecture that was named beside it.
        classes: outputs to ask a factory for; 10 if None.
        takes: `(C, H, W)` or `(H, W)` of its images, or its inputs by name; None: what it is meant
            for.

    Raises:
        CheckpointError: it cannot be read, or does not run on such inputs.
        GraphError: inputs that do not fit its signature.
        UsageError: a factory that fails or may not be imported; an architecture without weights.
    """
    if path.is_dir():
        found = open_folder(path)
    elif is_exported(path):
        found = _program(path)
    elif is_name(str(path)) and not path.exists():
        found = _made(str(path), arch, classes)
    else:
        return None
    if arch not in (None, found.arch):
        raise UsageError(f"{path} says what it is: {found.arch}. Give it without --model {arch}.")
    if takes and not isinstance(takes, tuple):
        found = replace(found, call=Network.of_specs(found.network, takes))
    size = takes if isinstance(takes, tuple) else None
    return _asked(found, path, shaped(size, found.input))


def is_whole(path: Path) -> bool:
    """Whether a file or folder is a network by itself."""
    return path.is_dir() or is_exported(path)


def _program(path: Path) -> Recognized:
    network = open_exported(path)
    inputs = list(network.inputs.values())
    image = inputs[0] if len(inputs) == 1 else None
    arch = f"pt2:{path.stem}"
    if isinstance(image, Tensor) and image.ndim == 4:
        _, channels, height, width = image.shape
        return Recognized(network.module, arch, 1, (channels, height, width))
    return Recognized(network.module, arch, 1, (3, *INPUT_SIZE), call=network)


def _made(name: str, arch: str | None, classes: int | None) -> Recognized:
    if arch is not None or name.partition(":")[0] in NAMES:
        raise UsageError(
            f"{name} is an architecture, and its weights must come from a file: give the file, and "
            f"--model {name}. Only a factory of your own may bring its weights along."
        )
    module, inputs = build(name, classes or 10), stated_inputs(name)
    call = Network.of_specs(module, inputs) if inputs else None
    size = stated_size(name) or declared_input(module) or (3, *INPUT_SIZE)
    return Recognized(module, name, 1, size, call=call)


@torch.no_grad()
def _asked(found: Recognized, path: Path, size: tuple[int, int, int]) -> Recognized:
    """With the number of its outputs, as it answers an image."""
    call = found.call or Network(found.network, (torch.zeros(2, *size),))
    try:
        answer = found.network(*call.args, **call.kwargs)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} must run on {described(call.inputs)}, but fails: {first}. Give the shape that "
            "it was made for with --input-shape; a .pt2 must be exported with a dynamic batch, "
            "dynamic_shapes=({0: torch.export.Dim.AUTO},)."
        ) from error
    leaves = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
    classes = leaves[0].shape[1] if leaves and leaves[0].ndim > 1 else 1
    return replace(found, classes=classes, input=size)
