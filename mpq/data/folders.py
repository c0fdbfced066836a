"""The image-folder layout in folders and zip archives, several of which can make one data set.

`<split>/<class>/<image>` or `<class>/<image>`, below one common folder or not; deeper folders
belong to their class. Images in no class folder, or all in one, have no labels. An archive without
split folders may carry the split in its name (`flowers-train-0.zip`). Sorted class names give the
label ids.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpq.data.containers import Container, open_container
from mpq.data.dataset import Images, Indices, Labels, as_indices
from mpq.data.images import Fit, decode, mode_of, open_image, probe_size
from mpq.data.splits import Splits
from mpq.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
DEFAULT_SIZE = (224, 224)
"""Size of images that differ among themselves, unless the caller knows better."""
PROBES = 16
ARCHIVES = (".zip", ".tar")


class Entry(NamedTuple):
    """One image file: its split (empty where the layout has none), class, and place."""

    split: str
    label: str
    container: Container
    name: str


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """A split of image files, decoded when read.

    Args:
        entries: the files, in order.
        labels: `[n]` int64.
        size: height and width to decode to.
        channels: to decode to, 1, 3 or 4.
        how: pictures are brought to the size, if the network says so.
    """

    entries: Sequence[Entry]
    labels: Labels
    size: tuple[int, int]
    channels: int = 3
    how: Fit | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all images as an array."""
        return len(self), *self.size, self.channels

    def picture(self, index: int) -> Image.Image:
        """One image as it lies in its file, in its channels.

        Raises:
            DataError: the file is damaged.
        """
        entry = self.entries[index]
        return open_image(entry.container.read(entry.name), self.channels, where=_where(entry))

    def mark(self) -> str:
        """Differs where another file is read: by name, size and time of each."""
        members: dict[Container, list[str]] = {}
        for entry in self.entries:
            members.setdefault(entry.container, []).append(entry.name)
        return repr([container.stamp(names) for container, names in members.items()])

    def read(self, indices: Indices) -> Images:
        """See `Split.read`.

        Raises:
            DataError: a file is damaged; the message names it.
        """
        chosen: NDArray[np.int64] = as_indices(indices, len(self))
        out = np.empty((len(chosen), *self.size, self.channels), np.uint8)
        form: dict[str, Any] = {"channels": self.channels, "how": self.how}
        for row, index in enumerate(chosen):
            entry = self.entries[index]
            data, where = entry.container.read(entry.name), _where(entry)
            out[row] = decode(data, self.size, where=where, **form)
        return out


def open_folders(
    paths: Sequence[Path],
    size: tuple[int, int] | None,
    *,
    channels: int = 3,
    order: Callable[[Entry], Any] | None = None,
) -> Splits:
    """Data of one folder or archive, or of several archives together; unlabelled without classes.

    Args:
        paths: folders or zip archives.
        size: height and width; None takes the images' own, or 224x224 where they differ.
        channels: 1, 3 or 4: grey, RGB or RGBA.
        order: sort key of the images within a split; by class and name otherwise.

    Raises:
        DataError: no images, an image twice, classes that differ between splits, other channels.
    """
    mode_of(channels)
    gathered: dict[str, list[Entry]] = {}
    for path in paths:
        for entry in list_entries(open_container(path)):
            gathered.setdefault(entry.split, []).append(entry)
    named_entries = _name_splits(gathered, paths)
    classes = _classes(named_entries["train"])
    ids = {label: i for i, label in enumerate(classes)}
    size = size or _common_size(named_entries["train"])
    splits: dict[str, FolderSplit] = {}
    for split, entries in named_entries.items():
        _check(split, entries, ids, paths)
        entries.sort(key=order or _by_name)
        labels = np.array([ids[entry.label] for entry in entries], np.int64)
        splits[split] = FolderSplit(entries, labels, size, channels)
    found = splits.get
    labelled = tuple(classes) if len(classes) > 1 else ()
    return Splits(labelled, splits["train"], found("validation"), found("test"), size)


def list_entries(container: Container) -> list[Entry]:
    """All images of a container with split and class; where none lies in a class folder: "".

    Raises:
        DataError: no images at all.
    """
    names = container.names()
    if not names:
        raise DataError(
            f"{container.path} has no images. It must hold CLASS/IMAGE or SPLIT/CLASS/IMAGE "
            "(train/, val/, test/), or images alone where no labels are needed."
        )
    parts = _below_common([name.split("/") for name in names])
    has_splits = _has_splits({part[0] for part in parts})
    named = "" if has_splits else archive_name(container.path)[1]
    entries, outside = [], []
    for name, part in zip(names, parts, strict=True):
        split = SPLITS.get(part[0].lower()) if has_splits else named
        inner = part[1:] if has_splits else part
        if split is None:
            continue
        if len(inner) >= 2:
            entries.append(Entry(split, inner[0], container, name))
        else:
            outside.append(Entry(split, "", container, name))
    told = getattr(container, "classes", {})
    if told:
        entries = [e._replace(label=f"{told[e.name]}") for e in [*entries, *outside]]
    entries = entries or outside
    if len(entries) < len(names):
        ignored = len(names) - len(entries)
        logger.warning("%s: %d images outside of class folders", container.path, ignored)
    return entries


def _classes(entries: list[Entry]) -> list[str]:
    """Names of the classes, sorted; where shards give class ids, all up to the largest."""
    found = {entry.label for entry in entries}
    if any(getattr(container, "classes", {}) for container in {e.container for e in entries}):
        return [str(i) for i in range(max(map(int, found)) + 1)]
    return sorted(found)


def archive_name(path: Path) -> tuple[str, str]:
    """Data set and split of `flowers-train-0.zip`: `flowers`, `train`; no split is empty."""
    if path.suffix.lower() not in ARCHIVES:
        return path.name, ""
    words = path.stem.split("-")
    first = 0 if path.suffix.lower() == ".tar" else 1  # shards have no other name
    for i in range(len(words) - 1, first - 1, -1):
        if words[i].lower() in SPLITS:
            return "-".join(words[:i]), SPLITS[words[i].lower()]
    part = len(words) > 1 and words[-1].isdigit()
    return "-".join(words[:-1]) if part else path.stem, ""


def _below_common(parts: list[list[str]]) -> list[list[str]]:
    """Strip folders that hold everything (`flowers/rose/1.jpg`) and are no split."""
    while (
        len({part[0] for part in parts}) == 1
        and parts[0][0].lower() not in SPLITS
        and min(map(len, parts)) >= 3
    ):
        parts = [part[1:] for part in parts]
    return parts


def _has_splits(tops: set[str]) -> bool:
    """Whether the top folders are splits; a class may be called `train` among other classes."""
    splits = {SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    only_splits = all(top.lower() in SPLITS for top in tops)
    return only_splits or ("train" in splits and len(splits) > 1)


def _name_splits(found: dict[str, list[Entry]], paths: Sequence[Path]) -> dict[str, list[Entry]]:
    """Splits by name; images of a single split, whatever its name, are to be divided: `train`."""
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    if "" in found or "train" not in found:
        raise DataError(
            f"{_places(paths)} must hold a train/ folder beside its other splits, or class folders "
            f"only. Got {', '.join(sorted(split or 'class folders' for split in found))}."
        )
    return found


def _check(split: str, entries: list[Entry], ids: dict[str, int], paths: Sequence[Path]) -> None:
    extra = sorted({entry.label for entry in entries} - ids.keys())
    if extra:
        raise DataError(
            f"the {split} split of {_places(paths)} must have no class that train lacks. "
            f"Got {', '.join(extra[:5])}; train has {len(ids)} classes."
        )
    if len(paths) > 1:  # but keys may begin anew in each shard
        names = Counter(e.name for e in entries if e.container.path.suffix.lower() != ".tar")
        twice = [name for name, n in names.items() if n > 1]
        if twice:
            raise DataError(
                f"{_places(paths)} hold {len(twice)} {split} images twice, such as {twice[0]}. "
                "Remove the archive that repeats another."
            )


def _by_name(entry: Entry) -> tuple[str, str]:
    return entry.label, entry.name


def _common_size(entries: list[Entry]) -> tuple[int, int]:
    """Size of some images spread over the split, if they agree."""
    some = entries[:: max(1, len(entries) // PROBES)]
    sizes = {probe_size(e.container.read(e.name), where=_where(e)) for e in some}
    return sizes.pop() if len(sizes) == 1 else DEFAULT_SIZE


def _where(entry: Entry) -> str:
    return f"image {entry.name} in {entry.container.path}"


def _places(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
