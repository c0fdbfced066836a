"""A whole split as arrays, decoded once per machine.

Decoded files are kept as `.npy` under `$MPQ_CACHE` or `~/.cache/mpq`, under a key of their names,
sizes and times: a changed file is decoded again. A cache that cannot be read or written costs time,
never the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpq.data.containers import Container
from mpq.data.dataset import Labels, Samples, Split, Subset
from mpq.data.folders import Entry, FolderSplit
from mpq.data.stream import Chain, Stream, streamed, too_large
from mpq.files import atomic_file, sweep
from mpq.limits import current

logger = logging.getLogger(__name__)

CHUNK = 1024
FORMAT = 1
"""Part of the key: raise it when decoding changes."""


def load_arrays(split: Split, *, in_files: bool = False) -> tuple[Samples, Labels]:
    """All images `[n, H, W, C]` uint8 and labels `[n]` int64 of a split.

    Images beyond the limit `arrays-mb`, and with `in_files` all that lie in files, are a `Stream`,
    which decodes what is asked of it. Subsets of one parent (train and validation) share the
    parent's cache file.

    Raises:
        DataError: a damaged image.
    """
    stream = streamed(split) if in_files or too_large(split) else None
    if stream is not None:
        return stream, split.labels
    parent, indices = split, np.arange(len(split))
    if isinstance(split, Subset):
        parent, indices = split.parent, split.indices
    if not isinstance(parent, FolderSplit):
        return parent.read(indices), split.labels  # arrays by name of what is no image
    cached = _cached(parent)
    images = parent.read(indices) if cached is None else cached[indices]
    return np.asarray(images), split.labels


def joined(first: tuple[Samples, Labels], more: Split) -> tuple[Samples, Labels]:
    """Images and labels, and after them those of another split, which have none: -1."""
    images, labels = first
    labels = np.concatenate([labels, np.full(len(more), -1)])
    if isinstance(images, Stream):
        return streamed(Chain((images.split, more))), labels
    return np.concatenate([images, load_arrays(more)[0]]), labels


def cache_folder() -> Path:
    """`$MPQ_CACHE`, or `~/.cache/mpq`."""
    return Path(os.environ.get("MPQ_CACHE") or Path.home() / ".cache" / "mpq")


def cached_files() -> list[Path]:
    """Everything in the cache, what was used last at the end."""
    found = [(path.stat(), path) for path in cache_folder().glob("*") if path.is_file()]
    return [path for stat, path in sorted(found, key=lambda f: max(f[0].st_atime, f[0].st_mtime))]


def trim(kept: Path) -> None:
    """Remove what was not used for longest until the cache is within its limit; `kept` stays."""
    sizes = {path: path.stat().st_size for path in cached_files()}
    total, most = sum(sizes.values()), current().cache_mb * 1e6
    for path, size in sizes.items():
        if total <= most:
            return
        if path != kept:
            logger.info("the cache is full: %s is removed", path)
            path.unlink(missing_ok=True)
            total -= size


def clear() -> None:
    """Remove everything."""
    for path in cached_files():
        path.unlink(missing_ok=True)


def _cached(split: FolderSplit) -> NDArray[np.uint8] | None:
    """The decoded split, mapped from its cache file; None where there can be no such file."""
    try:
        path = cache_folder() / f"images-{_key(split)}.npy"
        if not _readable(path, split):
            _write(path, split)
        images: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        logger.warning("decoded images are not cached in %s: %s", cache_folder(), error)
        return None
    return images


def _readable(path: Path, split: FolderSplit) -> bool:
    if not path.exists():
        return False
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        logger.warning("%s is damaged and is written again: %s", path, error)
        return False
    return bool(images.dtype == np.uint8 and images.shape == _shape(split))


def _write(path: Path, split: FolderSplit) -> None:
    """Decode into a temporary file beside `path`, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, older_than=3600.0)  # other commands write there too
    logger.info("decoding %d images into %s", len(split), path)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        "fortran_order": False,
        "shape": _shape(split),
    }
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(split), CHUNK):
            chunk = split.read(range(start, min(start + CHUNK, len(split))))
            file.write(chunk.tobytes())
    trim(path)


def _shape(split: FolderSplit) -> tuple[int, int, int, int]:
    return (len(split), *split.size, split.channels)


def _key(split: FolderSplit) -> str:
    members: dict[Container, list[Entry]] = {}
    for entry in split.entries:
        members.setdefault(entry.container, []).append(entry)
    stamps = [
        container.stamp([entry.name for entry in entries]) for container, entries in members.items()
    ]
    form: tuple[object, ...] = split.size
    if split.channels != 3 or split.how is not None:
        form = (*form, split.channels, *([] if split.how is None else [str(split.how)]))
    digest = hashlib.sha256(json.dumps([FORMAT, form, stamps]).encode())
    for entry in split.entries:
        digest.update(entry.name.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()[:24]
