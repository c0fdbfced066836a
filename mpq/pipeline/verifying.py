"""`verify`: does a file that is there answer as the quantized network it was made from?

And without that network: are its integers, in the runtime, those of the integer reference?
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq import origins
from mpq.data import DataSource, Normalization, open_data, sample_indices
from mpq.errors import DataError, UsageError
from mpq.export import foreign, runtime
from mpq.export.exact import ExactReport, verify_exact
from mpq.export.feeds import Feed, takes_images
from mpq.export.fileinfo import file_info
from mpq.export.meta import from_metadata
from mpq.export.onnx_file import verify_file
from mpq.export.portability import Portability, portability
from mpq.export.verify import VerifyReport
from mpq.pipeline.exporting import held_out
from mpq.pipeline.quantizing import Quantized
from mpq.policy import Policy
from mpq.targets import get_target

logger = logging.getLogger(__name__)


def verify_run(
    found: Quantized,
    path: Path,
    *,
    images: int = 1000,
    seed: int = 0,
    target: str | None = None,
    outputs: Mapping[str, str] | None = None,
) -> VerifyReport:
    """Compare a file with its quantized network, as the export did.

    Args:
        found: the quantized network.
        path: the ONNX file.
        images: test images (fewer if there are fewer).
        seed: of the sample.
        target: where it is to be judged; None: where its policy says.
        outputs: kinds of outputs by name, over those that the file was judged by.

    Raises:
        DataError: there are no images to compare on.
        UsageError: there is no such file.
        ExportError: the runtime cannot load or run the file.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist; `mpq export` writes model.onnx.")
    found.subject.require_data("verification")
    policy = _check_origin(found, path)
    judged = found.judged_as({} if policy is None else policy.outputs).judged_as(outputs or {})
    sample = held_out(found.subject, images, seed)
    if sample is None:
        raise DataError("verification needs at least one image. Got --num-test 0.")
    return verify_file(judged.graph, path, sample, target)


def _check_origin(found: Quantized, path: Path) -> Policy | None:
    """The policy in a file; refuse one that says it was made from another network.

    Raises:
        UsageError: it does.
    """
    known = origins.chain(path)
    for name in known.keys() & found.made_from.keys() - {"data"}:
        if known[name] != found.made_from[name]:
            raise UsageError(
                f"{path} was made from another network than the one it is compared with: its "
                f"{name} had the hash {known[name][:8]}..., not {found.made_from[name][:8]}.... "
                "Name the one that it was made from with --from."
            )
    policy = from_metadata(runtime.metadata(runtime.session(path)), str(path))
    of_file, of_network = policy and policy.model, found.policy.model
    if of_file is None or of_network is None:
        return policy
    keys = ("arch", "classes", "input", "sha256")
    differ = [k for k in keys if getattr(of_file, k) != getattr(of_network, k)]
    if differ:
        listed = (f"{k} {getattr(of_file, k)}, not {getattr(of_network, k)}" for k in differ)
        raise UsageError(
            f"{path} was made from another network than the one it is compared with: "
            f"{', '.join(listed)}. Name the one that it was made from with --from."
        )
    return policy


def exact_run(
    path: Path, source: DataSource, *, images: int = 4, seed: int = 0, target: str | None = None
) -> ExactReport:
    """Hold every integer tensor of a file against the integer reference.

    Args:
        path: any ONNX file.
        source: where test images come from; without data named here or in the file, noise.
        images: how many; a file that is fixed to a batch gets one batch.
        seed: of the sample, or of the noise.
        target: whose runtime is to run it; None: the one at hand.

    Raises:
        UsageError: there is no such file, no image is asked for, or no runtime of that target is
            installed.
        DataError: data that are named here cannot be read, or do not fit the file.
        ExportError: the runtime cannot load or run the file.
    """
    if images < 1:
        raise UsageError(f"images must be at least 1. Got {images}.")
    there = None if target is None else foreign.of_target(get_target(target))
    loaded = runtime.session(path)
    if not takes_images(loaded):
        return verify_exact(path, _arrays(path, loaded, source, images, seed), there)
    return verify_exact(path, _batch(path, loaded, source, images, seed)[0], there)


def _arrays(path: Path, loaded: runtime.Session, source: DataSource, count: int, seed: int) -> Feed:
    """Inputs of a file that takes no images: of data named here or in the file, else noise."""
    info = file_info(path, loaded)
    name, takes = source.data or info.data or "none", info.inputs
    if name != "none" and takes is not None:
        try:
            split = open_data(name, root=source.root, takes=takes).compared
            return list(split.read(sample_indices(split, count, seed)).values())
        except DataError as error:
            if source.data is not None:
                raise
            logger.warning("comparing on noise: %s", error)
    return runtime.noise(loaded, count)


def portability_run(
    path: Path,
    source: DataSource,
    runtimes: Sequence[foreign.Foreign],
    *,
    float_file: Path | None = None,
    images: int = 128,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Portability:
    """Run a file in several runtimes on test images, or on noise where nothing is known.

    Args:
        path: any ONNX file.
        source: where test images come from.
        runtimes: in which it is run.
        float_file: what speed is relative to.
        images: how many; a file that is fixed to a batch gets one batch.
        seed: of the sample.
        progress: called with what is being run.

    Raises:
        UsageError: there is no such file.
        DataError: data that are named here cannot be read, or do not fit the file.
        ExportError: the runtime of this Python cannot load the file.
    """
    loaded = runtime.session(path)
    batch: Feed
    if takes_images(loaded):
        batch, labels = _batch(path, loaded, source, images, seed)
    else:
        batch, labels = _arrays(path, loaded, source, images, seed), None
    return portability(
        path, batch, labels=labels, float_file=float_file, runtimes=runtimes, progress=progress
    )


def _batch(
    path: Path, loaded: runtime.Session, source: DataSource, count: int, seed: int
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Test images as the file takes them, and labels; noise and none where nothing is known."""
    info, takes = file_info(path, loaded), runtime.model_input(loaded)
    count = takes.batch or count
    name = source.data or info.data or "none"
    if name != "none":
        try:
            shape = takes.shape(1)
            height, width = shape[1:3] if takes.channels_last else shape[2:4]
            size = height, width
            data = open_data(name, root=source.root, size=size, pictures=info.pictures)
            chosen = sample_indices(data.compared, count, seed)
            pixels = data.compared.read(chosen)
            labels = np.asarray(data.compared.labels)[chosen] if data.labelled else None
        except DataError as error:
            if source.data is not None:
                raise
            logger.warning("comparing on noise: %s", error)
        else:
            norm = Normalization.parse(info.normalize or "none")
            return (pixels if takes.integer else norm.apply(pixels)), labels
    rng = np.random.default_rng(seed)
    if takes.integer:
        return rng.integers(0, 256, takes.shape(count), np.uint8), None
    return rng.standard_normal(takes.shape(count), np.float32), None
