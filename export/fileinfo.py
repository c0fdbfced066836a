"""What a model file says of itself: what it takes, gives and was made from. No torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpq.errors import PolicyError
from mpq.inputs import InputSpecs

from . import runtime
from .feeds import specs_of, takes_images
from .meta import from_metadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a file says of itself in its metadata; None where it says nothing."""

    normalize: str | None = None
    input: tuple[int, int, int] | None = None
    classes: int | None = None
    data: str | None = None
    inputs: InputSpecs | None = None
    """What it takes, if that is more than a batch of images."""
    outputs: Mapping[str, str] | None = None
    """Kinds of its outputs by name; None: not known, or those of a classifier."""
    pictures: str | None = None
    """How those of another size are brought to it (`mpq.data.images.Fit`)."""


def file_info(path: Path, loaded: runtime.Session | None = None) -> FileInfo:
    """Read the policy that travels in a model file; a foreign file only tells what it takes.

    Args:
        path: the file.
        loaded: its session, where there is one already.

    Raises:
        UsageError: there is no such file.
        ExportError: the runtime cannot load it.
    """
    loaded = loaded or runtime.session(path)
    size, inputs = None, None
    if takes_images(loaded):
        takes = runtime.model_input(loaded)
        if takes.height and takes.width:
            size = (takes.channels, takes.height, takes.width)
    else:
        inputs = specs_of(loaded)
    try:
        policy = from_metadata(runtime.metadata(loaded), str(path))
    except PolicyError as error:  # of a later mpq, perhaps: it can be measured all the same
        logger.warning("%s", error)
        policy = None
    if policy is None:
        return FileInfo(input=size, inputs=inputs)
    outputs = policy.outputs or None
    if policy.model is None:
        return FileInfo(input=size, data=policy.data.name, inputs=inputs, outputs=outputs)
    model = policy.model
    size = None if inputs else size or model.input
    inputs = model.inputs or inputs
    name, pictures = policy.data.name, model.pictures
    return FileInfo(model.normalize, size, model.classes, name, inputs, outputs, pictures)
