"""Networks in files: read any checkpoint, write ours.

Our own files are a dict with `format: mpq/model`, a version, what the network is, what it was
trained on and how well it did, and its `state`. Of foreign files, what is taken for the network is
said in `mpq.zoo.parts`; its architecture is found from the weights, or named. A folder of
transformers or timm, a `.pt2` program, a pickled module and a factory that brings its weights are
networks by themselves.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mpq import limits
from mpq._torchfile import load_safe, save_atomic
from mpq.capture.network import Network
from mpq.errors import CheckpointError, UsageError
from mpq.inputs import InputSpecs, Shape
from mpq.policy import ModelInfo
from mpq.userimport import trusting
from mpq.zoo.builder import stated_inputs
from mpq.zoo.detection import recognize, recognize_module
from mpq.zoo.fitting import Recognized
from mpq.zoo.libraries import declared_pictures
from mpq.zoo.parts import NESTS, Part, choose, levels, states, told
from mpq.zoo.spelling import strip
from mpq.zoo.whole import open_whole

__all__ = [
    "Loaded",
    "Reading",
    "load_model",
    "load_safe",
    "loaded_from",
    "open_model",
    "save_atomic",
    "save_model",
    "weights_hash",
]

logger = logging.getLogger(__name__)

FORMAT = "mpq/model"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """How a network is to be read from a file.

    Args:
        arch: an architecture by name, as `mpq.zoo.builder` takes it; None: what the weights fit.
        classes: number of outputs that the caller expects; None: what the weights have.
        weights: `ema`, `raw`, or the name of a part of the file; None: averaged weights where there
            are some, else the others.
        input: `(C, H, W)` or `(H, W)` of its images, or its inputs by name (`mpq.inputs`); None:
            what the network is meant for.
        trust_pickle: run the code inside the file if it has some.
    """

    arch: str | None = None
    classes: int | None = None
    weights: str | None = None
    input: Shape | None = None
    trust_pickle: bool = False

    @property
    def size(self) -> tuple[int, ...] | None:
        """Of images, where it is given."""
        return self.input if isinstance(self.input, tuple) else None

    @property
    def inputs(self) -> InputSpecs | None:
        """By name, where they are given."""
        return None if isinstance(self.input, tuple) else self.input


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network from a file.

    Args:
        module: the network, float32, on the CPU, in evaluation mode.
        info: what it is; `normalize` is empty when the file does not say.
        data: name of the data it was trained on; None for a foreign file.
        metrics: what was measured when it was saved, empty for a foreign file.
        call: an example call, of a network that takes anything but one batch of images.
    """

    module: nn.Module
    info: ModelInfo
    data: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    call: Network | None = None


def load_model(
    path: str | Path,
    *,
    arch: str | None = None,
    classes: int | None = None,
    weights: str | None = None,
    input: Shape | None = None,
    trust_pickle: bool = False,
) -> Loaded:
    """Load a network.

    Args:
        path: a file of `save_model`, any state dict that `torch.save` or safetensors wrote, a
            folder of transformers or timm, a `.pt2` program, or `package.module:factory` for a
            network that brings its weights.
        arch: an architecture by name, as `mpq.zoo.builder` takes it; that it is named here is leave
            to import its code. None: what the weights fit.
        classes: number of outputs that the caller expects; default: what the weights have.
        weights: `ema`, `raw`, or the name of a part of the file; None: averaged weights where there
            are some, else the others.
        input: `(C, H, W)` or `(H, W)` of its images, or its inputs by name (`mpq.inputs`); None:
            what the network is meant for.
        trust_pickle: run the code inside the file if it has some (a pickled module).

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, not trusted, has a weight
            that is not finite, does not fit the architecture, or fits several.
        UsageError: an unknown architecture, a library that is missing, a factory that fails.
    """
    with trusting(*([arch] if arch else []), str(path)):
        return open_model(Path(path), Reading(arch, classes, weights, input, trust_pickle))


def open_model(path: Path, how: Reading) -> Loaded:
    """`load_model` without leave to import what has not been trusted."""
    found = open_whole(path, how.arch, how.classes, how.input)
    if found is None:
        return loaded_from(load_safe(path, trust_pickle=how.trust_pickle), path, how)
    if how.weights is not None:
        raise UsageError(
            f"--weights chooses among the parts of a checkpoint. {path} is a network by itself."
        )
    return _loaded(found, path, how)


def loaded_from(content: Any, path: Path, how: Reading) -> Loaded:
    """`open_model` of a file that has been read: what `load_safe` gave for `path`."""
    saved = _saved_info(content, path)
    if saved and how.input is None:
        how = replace(how, input=saved.inputs)
    parts = [Part("", content["state"])] if saved else states(content)
    _check_parts(parts, content, path)
    try:
        found = _recognized(parts, saved, how)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    loaded = _loaded(found, path, how)
    if saved is None:
        return loaded
    digest = loaded.info.sha256
    if saved.sha256 not in ("", digest, weights_hash(content["state"])):
        raise CheckpointError(
            f"the weights in {path} must have the sha256 {saved.sha256[:12]}... that they were "
            f"saved with. Got {digest[:12]}...: it is damaged or was changed. Write it again."
        )
    info = loaded.info.replace(normalize=saved.normalize, pictures=saved.pictures)
    data, metrics = str(content.get("data", "")), content.get("metrics", {})
    return replace(loaded, info=info, data=data, metrics=metrics)


def _loaded(found: Recognized, path: Path, how: Reading) -> Loaded:
    """A network as it was found, its weights checked and counted."""
    if found.told:
        logger.warning("%s: %s", path, found.told)
    if how.classes not in (None, found.classes):
        raise CheckpointError(
            f"the network in {path} must have {how.classes} classes. Its last layer has "
            f"{found.classes} outputs instead. Give the data set that it was trained on."
        )
    state, call, inputs = found.network.state_dict(), found.call, how.inputs
    _check_finite(state, path)
    if how.input is None and call is None and found.arch in (how.arch, str(path)):
        inputs = stated_inputs(found.arch)
    normalize, pictures = declared_pictures(found.network)
    if inputs and call is None:
        call = Network.of_specs(found.network, inputs)
    info = ModelInfo(
        arch=found.arch,
        classes=found.classes,
        input=found.input,
        normalize=found.normalize or normalize,
        pictures=pictures,
        checkpoint=str(path) if path.exists() else "",
        sha256=weights_hash(state),
        weights=how.weights,
        inputs=None if inputs is None else dict(inputs),
    )
    return Loaded(found.network, info, call=call)


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
        "info": info.model_dump(mode="json", exclude_none=True),
        "data": data,
        "metrics": dict(metrics or {}),
        "state": state,
    }
    save_atomic(content, path)


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


def _recognized(parts: Sequence[Part], saved: ModelInfo | None, how: Reading) -> Recognized:
    """The network of a file: a module as it is, a state in the network that it belongs to."""
    if parts[0].module is not None:
        fits = next(levels(parts, how.weights))
        part = choose(fits)
        assert part.module is not None
        found = recognize_module(part.module, how.arch, size=how.size)
        return replace(found, told=told(part, fits))
    arch = how.arch or (saved.arch if saved else None)
    size = how.size or (saved.input if saved else None)
    return recognize(parts, arch, classes=how.classes, size=size, weights=how.weights)


def _check_parts(parts: Sequence[Part], content: Any, path: Path) -> None:
    """Refuse a file without weights, and tensors that are not there value by value."""
    for part in parts:
        total = 0
        for name, tensor in part.state.items():
            _check_stored(name, tensor, path)
            total += tensor.numel() * 4
        if total > limits.current().file_mb * 1e6:
            got = f"{total / 1e6:,.1f} MB as float32"
            raise CheckpointError(limits.exceeded(f"the weights in {path}", "file_mb", got))
    if parts:
        return
    while isinstance(content, Mapping):
        got = f"the keys {[str(k) for k in content][:8]}"
        inner = next((content[k] for k in NESTS if isinstance(content.get(k), Mapping)), None)
        if inner is None or inner is content:
            break
        content = inner
    else:
        got = f"an object of type {type(content).__name__}"
    raise CheckpointError(
        f"the checkpoint {path} must hold a state dict, at the top or under a key such as "
        f"{', '.join(NESTS)}. Got {got} instead."
    )


def _check_stored(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse a tensor whose values do not lie in the file one by one, as floats.

    Raises:
        CheckpointError: a quantized, sparse or meta tensor, or one that repeats what it stores.
    """
    if tensor.is_quantized:
        raise CheckpointError(
            f"{name} of the checkpoint {path} must be a float tensor, but is quantized "
            f"({tensor.dtype}). mpq starts from the float network."
        )
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


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{name} of the checkpoint {path} must be finite, but {bad} of its "
                f"{tensor.numel()} values are NaN or infinite. The training that wrote it diverged "
                f"or the file is damaged; take an earlier one."
            )
