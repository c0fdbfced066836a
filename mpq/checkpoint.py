"""Networks in files: read any checkpoint, write ours.

Our own files are a dict with `format: mpq/model`, a version, what the network is, what it was
trained on and how well it did, and its `state`. Foreign files may hold a state dict at the top or
under `state_dict`, `model` and the like; their architecture is found from the weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mpq import limits
from mpq._torchfile import load_safe, save_atomic
from mpq.errors import CheckpointError
from mpq.policy import ModelInfo
from mpq.zoo.detection import Recognized, recognize, recognize_module, strip

__all__ = [
    "Loaded",
    "load_model",
    "load_safe",
    "loaded_from",
    "read_state",
    "save_atomic",
    "save_model",
    "weights_hash",
]

logger = logging.getLogger(__name__)

DEPTH = 8
"""State dicts are looked for under so many keys in a row; some files contain themselves."""
FORMAT = "mpq/model"
VERSION = 1
_NESTS = ("state_dict", "model_state_dict", "model", "net", "state", "network", "weights")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network from a file.

    Args:
        module: the network, float32, on the CPU, in evaluation mode.
        info: what it is; `normalize` is empty when the file does not say.
        data: name of the data it was trained on; None for a foreign file.
        metrics: what was measured when it was saved, empty for a foreign file.
    """

    module: nn.Module
    info: ModelInfo
    data: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


def load_model(
    path: str | Path,
    *,
    arch: str | None = None,
    classes: int | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """Load a network.

    Args:
        path: a file of `save_model`, or any state dict that `torch.save` wrote.
        arch: an architecture by name or `package.module:factory`; default: what the weights fit.
        classes: number of outputs that the caller expects; default: what the weights have.
        trust_pickle: run the code inside the file if it has some (a pickled module).

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, not trusted, has a weight
            that is not finite, or does not fit the architecture.
        UsageError: an unknown architecture, a factory that fails.
    """
    path = Path(path)
    return loaded_from(load_safe(path, trust_pickle=trust_pickle), path, arch=arch, classes=classes)


def loaded_from(
    content: Any, path: Path, *, arch: str | None = None, classes: int | None = None
) -> Loaded:
    """`load_model` of a file that has been read: what `load_safe` gave for `path`."""
    saved = _saved_info(content, path)
    found = _recognized(content, path, arch, classes, saved)
    if classes not in (None, found.classes):
        raise CheckpointError(
            f"the network in {path} must have {classes} classes. Its last layer has "
            f"{found.classes} outputs instead. Give the data set that it was trained on."
        )
    info = ModelInfo(
        arch=found.arch,
        classes=found.classes,
        input=found.input,
        normalize=saved.normalize if saved else "",
        checkpoint=str(path),
        sha256=weights_hash(found.network.state_dict()),
    )
    if saved is None:
        return Loaded(found.network, info)
    if saved.sha256 not in ("", info.sha256, weights_hash(_find_state(content, path))):
        raise CheckpointError(
            f"the weights in {path} must have the sha256 {saved.sha256[:12]}... that they were "
            f"saved with. Got {info.sha256[:12]}...: it is damaged or was changed. Write it again."
        )
    return Loaded(found.network, info, str(content.get("data", "")), content.get("metrics", {}))


def save_model(
    path: str | Path,
    module: nn.Module,
    *,
    info: ModelInfo,
    data: str = "",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a network so that `load_model` needs no further word.

    Raises:
        CheckpointError: the file cannot be written; one that was there stays as it was.
    """
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    info = info.replace(sha256=weights_hash(state))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "info": info.model_dump(mode="json"),
        "data": data,
        "metrics": dict(metrics or {}),
        "state": state,
    }
    save_atomic(content, path)


def read_state(path: str | Path, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """The weights in a file, under the names they have there, floats as float32, all finite.

    Raises:
        CheckpointError: as for `load_model`.
    """
    path = Path(path)
    return _checked(_find_state(load_safe(path, trust_pickle=trust_pickle), path), path)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of names.

    A prefix that all names share (`module.`) and counters (`num_batches_tracked`) do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(strip(state).items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _saved_info(content: Any, path: Path) -> ModelInfo | None:
    """The header of a file of ours; None for a foreign file."""
    form = content.get("format") if isinstance(content, Mapping) else None
    if not isinstance(form, str) or not form.startswith("mpq/"):
        return None
    if form != FORMAT or content.get("version") != VERSION:
        raise CheckpointError(
            f"the checkpoint {path} must have the format {FORMAT}, version {VERSION}. Got {form}, "
            f"version {content.get('version')} instead."
        )
    try:
        return ModelInfo.model_validate(content.get("info"))
    except ValidationError as error:
        raise CheckpointError(f"the header of the checkpoint {path} is damaged: {error}") from None


def _recognized(
    content: Any, path: Path, arch: str | None, classes: int | None, saved: ModelInfo | None
) -> Recognized:
    """The network of a file: a module as it is, a state dict in the network that it belongs to."""
    state = _checked(_find_state(content, path), path)
    module = _find_module(content)
    try:
        if module is not None:
            return recognize_module(module, arch)
        if saved is None:
            return recognize(state, arch, classes=classes)
        return recognize(state, arch or saved.arch, classes=classes, size=saved.input)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _find_module(content: Any, depth: int = 0) -> nn.Module | None:
    """The module in a trusted file: the content itself or an entry of it."""
    if isinstance(content, nn.DataParallel):
        content = content.module
    if isinstance(content, nn.Module):
        return content
    if not isinstance(content, Mapping) or depth > DEPTH:
        return None
    nested = (_find_module(content[key], depth + 1) for key in _NESTS if key in content)
    return next((module for module in nested if module is not None), None)


def _find_state(content: Any, path: Path, depth: int = 0) -> dict[str, Tensor]:
    """The tensors of a file, from where training scripts put them."""
    module = _find_module(content)
    if module is not None:
        return module.state_dict()
    if isinstance(content, Mapping):
        for key in _NESTS if depth < DEPTH else ():
            if isinstance(content.get(key), Mapping):
                return _find_state(content[key], path, depth + 1)
        state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if state:
            dropped = [str(k) for k in content if str(k) not in state]
            if dropped:
                logger.info("%s: entries that are no tensors are left out: %s", path, dropped)
            return state
    got = f"the keys {[str(k) for k in content][:8]}" if isinstance(content, Mapping) else ""
    raise CheckpointError(
        f"the checkpoint {path} must hold a state dict, at the top or under one of "
        f"{', '.join(_NESTS)}. Got {got or f'an object of type {type(content).__name__}'} instead."
    )


def _check_stored(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse a tensor whose values do not lie in the file one by one.

    Raises:
        CheckpointError: a sparse or a meta tensor, or one that repeats what it stores.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "has no values (a meta tensor)" if tensor.is_meta else f"is {tensor.layout}"
    elif tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 1_000_000):
        kind = f"has {tensor.numel():,} values in {tensor.untyped_storage().nbytes():,} bytes"
    else:
        return
    raise CheckpointError(
        f"{name} of the checkpoint {path} must be stored value by value, but {kind}. Save "
        "tensor.to_dense().contiguous() in its place."
    )


def _checked(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Floats as float32; refuse weights that are quantized already or not finite."""
    halves = {str(t.dtype) for t in state.values() if t.is_floating_point()} - {"torch.float32"}
    if halves:
        logger.info("%s: weights of type %s become float32", path, ", ".join(sorted(halves)))
    checked, total = {}, 0
    for name, tensor in state.items():
        if tensor.is_quantized:
            raise CheckpointError(
                f"{name} of the checkpoint {path} must be a float tensor, but is quantized "
                f"({tensor.dtype}). mpq starts from the float network."
            )
        _check_stored(name, tensor, path)
        total += tensor.numel() * 4
        if total > limits.current().file_mb * 1e6:
            got = f"{total / 1e6:,.1f} MB as float32"
            raise CheckpointError(limits.exceeded(f"the weights in {path}", "file_mb", got))
        tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{name} of the checkpoint {path} must be finite, but {bad} of its "
                f"{tensor.numel()} values are NaN or infinite. The training that wrote it diverged "
                f"or the file is damaged; take an earlier one."
            )
        checked[name] = tensor
    return checked
