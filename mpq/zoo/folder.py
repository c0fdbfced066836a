"""Networks in folders, as `save_pretrained` of transformers and timm on the Hub write them.

`config.json` names a class of transformers (`architectures`) or a network of timm (`architecture`).
The folder is all that is read: nothing is fetched, no code in it is run, and the weights must be
safetensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq._torchfile import load_safe
from mpq.data import Normalization
from mpq.errors import CheckpointError
from mpq.limits import read_text
from mpq.zoo.fitting import Fitting, Recognized
from mpq.zoo.libraries import SIDE, build_timm, declared_config, declared_input, library
from mpq.zoo.parts import Part
from mpq.zoo.spelling import few

CONFIG = "config.json"
WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
_FETCHING = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)


class Logits(nn.Module):
    """A network of transformers as images to logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` to logits `[N, K]` or `[N, K, h, w]`."""
        logits: Tensor = self.network(pixel_values=pixel_values).logits
        return logits


def open_folder(path: Path) -> Recognized:
    """The network in a folder.

    Raises:
        CheckpointError: it holds no network of these libraries, or weights that do not fit.
        UsageError: the library is not installed.
    """
    config = _json(path / CONFIG)
    if config is None:
        raise CheckpointError(
            f"the folder {path} must hold {CONFIG} and {WEIGHTS[1]}, as save_pretrained of "
            f"transformers or timm on the Hub write them. It has no {CONFIG}."
        )
    if not any((path / name).is_file() for name in WEIGHTS):
        raise CheckpointError(
            f"the folder {path} must hold its weights as {' or '.join(WEIGHTS)}. Other files are "
            "pickles, which can run code: load them where they come from and call "
            "save_pretrained(folder, safe_serialization=True)."
        )
    if isinstance(config.get("architecture"), str):
        return _timm(path, config)
    if isinstance(config.get("architectures"), list) and config["architectures"]:
        return _transformers(path, str(config["architectures"][0]))
    raise CheckpointError(
        f"{path / CONFIG} must name a network: `architectures` for transformers, `architecture` "
        f"for timm. Got the keys {few(list(config), 8)}."
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of the parts that its index names.

    Raises:
        CheckpointError: a part is missing, damaged, or lies elsewhere.
    """
    index = _json(path / WEIGHTS[0])
    if index is None:
        return dict(load_safe(path / WEIGHTS[1]))
    names = dict.fromkeys((index.get("weight_map") or {}).values())
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise CheckpointError(f"{path / WEIGHTS[0]} must name files of its folder in `weight_map`.")
    return {k: v for name in names for k, v in load_safe(path / name).items()}


def _timm(path: Path, config: dict[str, Any]) -> Recognized:
    name, more = config["architecture"], dict(config.get("model_args") or {})
    told = dict(config.get("pretrained_cfg") or {})
    more = {k: v for k, v in more.items() if k not in _FETCHING}
    channels = more.pop("in_chans", None) or (told.get("input_size") or (3,))[0]
    count = int(config.get("num_classes") or told.get("num_classes") or 1000)
    fitting = Fitting(name, lambda n: build_timm(name, n, channels, **more).eval(), count)
    part = Part("", read_weights(path))
    fit = fitting.fit(part)
    if fit is None:
        raise CheckpointError(f"{path}: {fitting.refusal([part])}")
    fit.network.__dict__["pretrained_cfg"] = {**declared_config(fit.network), **told}
    size = declared_input(fit.network) or (channels, SIDE, SIDE)
    return Recognized(fit.loaded(), f"timm:{name}", fit.classes, size)


def _transformers(path: Path, name: str) -> Recognized:
    transformers = library("transformers", f"the folder {path}")
    kind: Any = getattr(transformers, name, None)
    of_library = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not of_library:
        raise CheckpointError(
            f"{path / CONFIG} must name a network of transformers {transformers.__version__}. Got "
            f"{name!r}. Code that comes with a folder is not run; give the function that builds "
            "the network with --model package.module:factory, and the weights as a file."
        )
    with _offline(transformers):
        try:
            network, lacking = kind.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{path} cannot be read as a {name}: {first}") from error
    wrong = {k: [str(v) for v in lacking[k]] for k in ("missing_keys", "mismatched_keys")}
    if any(wrong.values()):
        listed = "; ".join(
            f"{len(v)} {k.partition('_')[0]} ({few(v)})" for k, v in wrong.items() if v
        )
        raise CheckpointError(
            f"the weights in {path} must be those of {name}, but differ: {listed}."
        )
    network = network.eval()
    shown = _json(path / "preprocessor_config.json") or {}
    size = declared_input(network) or (getattr(network.config, "num_channels", 3), *_sides(shown))
    if name.endswith(("ForImageClassification", "ForSemanticSegmentation")):
        network = Logits(network)
    how = _normalization(shown.get("image_mean"), shown.get("image_std"))
    how = "none" if shown.get("do_normalize") is False else how
    return Recognized(network, f"transformers:{name}", 1, size, normalize=how)


def _normalization(mean: Any, std: Any) -> str:
    """What a configuration says of it, in mpq's form; empty where it says nothing."""
    if mean and std and len(mean) == len(std) == 3:
        return str(Normalization(tuple(mean), tuple(std)))
    return ""


def _sides(shown: dict[str, Any]) -> tuple[int, int]:
    """Height and width that a preprocessor makes."""
    for size in (shown.get("crop_size"), shown.get("size")):
        if isinstance(size, int):
            return size, size
        if isinstance(size, dict):
            side = size.get("shortest_edge") or SIDE
            return int(size.get("height") or side), int(size.get("width") or side)
    return SIDE, SIDE


@contextlib.contextmanager
def _offline(transformers: Any) -> Iterator[None]:
    """Let nothing be fetched, and no progress be shown, while the block runs."""
    constants = library("huggingface_hub", "transformers").constants
    bars, before = transformers.utils.logging, constants.HF_HUB_OFFLINE
    shown = bars.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    bars.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if shown:
            bars.enable_progress_bar()


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(read_text(path, CheckpointError))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Got {type(found).__name__}.")
    return found
