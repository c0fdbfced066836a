"""From a data name to a data set: which forms there are, and where they are looked for."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpq.data.arrays import is_array_file, noise_splits, open_arrays
from mpq.data.cifar import CIFAR, batches_in, open_batches, open_cifar_images
from mpq.data.containers import Folder
from mpq.data.dataset import DataSet, Split
from mpq.data.digits import open_digits
from mpq.data.factory import open_factory
from mpq.data.folders import ARCHIVES, DEFAULT_SIZE, FolderSplit, archive_name, open_folders
from mpq.data.images import Fit
from mpq.data.items import ItemSplit
from mpq.data.splits import Splits, divide
from mpq.errors import DataError, nearest
from mpq.inputs import InputSpec, InputSpecs
from mpq.trusted import is_name

logger = logging.getLogger(__name__)

FORMS = (
    "digits, cifar10, cifar100, a folder, zip or tar archive of CLASS/IMAGE or SPLIT/CLASS/IMAGE "
    "(or of images alone, which then have no labels), NAME for archives NAME-train-*.zip and "
    "NAME-test.zip, a folder of shards (*.tar), a .npy or .npz file, package.module:factory, "
    "noise, or none"
)
USUAL_PLACES = ("data", ".", "~/.cache/torch", "~/.cache/torch/datasets", "~/data", "~/datasets")


def open_data(
    name: str | Path,
    *,
    root: str | Path | None = None,
    size: tuple[int, ...] | None = None,
    holdout: int | None = None,
    seed: int = 0,
    takes: InputSpecs | None = None,
    pictures: str | None = None,
) -> DataSet:
    """Open data by name; images are decoded later, when they are read.

    Args:
        name: `digits`, `cifar10`, `cifar100`, a folder, a zip archive, a pattern of archives
            (`flowers-*.zip`), a name whose archives `NAME-train-*.zip` lie in a searched folder,
            a `.npy` or `.npz` file, `package.module:factory`, or `noise`.
        root: where to look first; then `$MPQ_DATA` and the usual places.
        size: `(H, W)` or `(C, H, W)` of the images; None keeps their own, in RGB.
        holdout: validation images taken out of train, stratified; None takes 10 %. Data with a
            validation and a test split of their own keep them.
        seed: of the holdout.
        takes: inputs of a network that takes more than one batch of images: only arrays, factories
            and noise have them.
        pictures: how those of another size are brought to it (`mpq.data.images.Fit`), as the
            network says.

    Raises:
        DataError: nothing under that name, or data that are not what they must be.
    """
    text = str(name).strip()
    if size is not None and (len(size) not in (2, 3) or min(size) < 1):
        raise DataError(f"size must be height and width of at least 1. Got {size}.")
    found = _open(text, root, size, takes)
    if isinstance(found, DataSet):
        return found
    return divide(_fitted(found, pictures), name=text, holdout=holdout, seed=seed)


def open_unlabelled(
    name: str | Path,
    *,
    root: str | Path | None = None,
    size: tuple[int, ...] | None = None,
    pictures: str | None = None,
) -> Split:
    """All training images under a name of `open_data`, none held out; their labels mean nothing.

    A test split that the data bring is left alone. Raises as `open_data`.
    """
    found = _open(str(name).strip(), root, size)
    return found.train if isinstance(found, DataSet) else _fitted(found, pictures).train


def _fitted(found: Splits, pictures: str | None) -> Splits:
    """Splits whose pictures are brought to size as the network says; arrays have theirs."""
    if pictures is None:
        return found
    how = Fit.parse(pictures)
    splits: dict[str, Any] = {"train": found.train, "validation": found.validation,
                              "test": found.test}  # fmt: skip
    for name, split in splits.items():
        if isinstance(split, FolderSplit | ItemSplit):
            splits[name] = replace(split, how=how)
    return replace(found, **splits)


@dataclass(frozen=True)
class DataSource:
    """Where a command finds its images: `--data`, `--data-root`, `--holdout`, `--unlabelled`."""

    data: str | None = None
    root: Path | None = None
    holdout: int | None = None
    unlabelled: str | None = None

    def more(self, size: tuple[int, ...], pictures: str | None = None) -> Split | None:
        """The images without labels, if any are named; arguments as of `open_unlabelled`.

        Raises:
            DataError: nothing under that name.
        """
        if self.unlabelled is None:
            return None
        return open_unlabelled(self.unlabelled, root=self.root, size=size, pictures=pictures)


def _open(
    name: str,
    root: str | Path | None,
    size: tuple[int, ...] | None,
    takes: InputSpecs | None = None,
) -> Splits | DataSet:
    if name in ("none", ""):
        raise DataError(
            f"data is {name or 'empty'!r}, but images are needed here. Name some with --data: "
            f"{FORMS.removesuffix(', or none')}."
        )
    if name == "noise":
        return noise_splits(takes or {"input": InputSpec(size if size else (3, *DEFAULT_SIZE))})
    if is_name(name) and not Path(name).exists():
        return open_factory(name, size, takes)
    sides, channels = _sides(size), size[0] if size and len(size) == 3 else 3
    if name == "digits" and takes is None:
        return open_digits(sides, channels)
    places = search_places(root)
    paths = [] if name in (*CIFAR, "digits") else _locate(name, places)
    if len(paths) == 1 and is_array_file(paths[0]):
        logger.info("data %s: %s", name, paths[0])
        return open_arrays(paths[0], size, takes)
    if takes is not None:
        raise DataError(
            f"the network must take one batch of images to be given {name}. It takes "
            f"{', '.join(takes)}. Give a .npz file with an array for each, a module:factory of "
            "such batches, or --data noise."
        )
    if name in CIFAR:
        return _open_cifar(name, places, sides, channels)
    if not paths:
        raise DataError(_not_found(name, places))
    logger.info("data %s: %s", name, ", ".join(map(str, paths)))
    return _open_paths(paths, sides, channels)


def _sides(size: tuple[int, ...] | None) -> tuple[int, int] | None:
    return None if size is None else (size[-2], size[-1])


def search_places(root: str | Path | None) -> list[Path]:
    """Folders to look in, first to last: `root`, `$MPQ_DATA`, the usual places that exist.

    Raises:
        DataError: `root` is no folder. A missing `$MPQ_DATA` is named only if nothing is found.
    """
    if root is not None and not Path(root).expanduser().is_dir():
        raise DataError(f"the data root must be an existing folder. Got {root}.")
    given = [place for place in (root, os.environ.get("MPQ_DATA")) if place]
    usual = [Path(place).expanduser() for place in USUAL_PLACES]
    return [Path(place).expanduser() for place in given] + [p for p in usual if p.is_dir()]


def _open_cifar(
    name: str, places: Sequence[Path], size: tuple[int, int] | None, channels: int
) -> Splits:
    batches = CIFAR[name]
    for place in places:
        below = place / name
        for folder in (place / batches.folder, place, below / batches.folder, below):
            if batches_in(folder) is batches:
                logger.info("data %s: %s", name, folder)
                return open_batches(folder, batches, size, channels)
        paths = _archives_in(_named(name, place))
        if paths:
            logger.info("data %s: %s", name, ", ".join(map(str, paths)))
            return open_cifar_images(name, paths, size, channels)
    raise DataError(
        f"data {name} is not there. Looked for {batches.folder}/, {name}/, {name}.zip and "
        f"{name}-train-*.zip in {_list(places)}. Name its folder with --data-root or $MPQ_DATA."
    )


def _open_paths(paths: Sequence[Path], size: tuple[int, int] | None, channels: int) -> Splits:
    batches = batches_in(paths[0]) if len(paths) == 1 else None
    if batches is not None:
        return open_batches(paths[0], batches, size, channels)
    return open_folders(_archives_in(paths), size, channels=channels)


def _archives_in(paths: Sequence[Path]) -> Sequence[Path]:
    """The archives of a folder that holds no images, otherwise the paths as they are.

    Raises:
        DataError: archives of several data sets.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        return paths
    folder = paths[0]
    archives = sorted(p for p in folder.iterdir() if p.suffix.lower() in ARCHIVES)
    if not archives or Folder(folder).names():
        return paths
    names = sorted({archive_name(path)[0] for path in archives})
    if len(names) > 1:
        raise DataError(
            f"{folder} has archives of several data sets: {', '.join(names)}. Name one of them, "
            f"with {folder} as --data-root."
        )
    return archives


def _locate(name: str, places: Sequence[Path]) -> list[Path]:
    """Paths of a name: itself, below a place, a pattern, or the archives of a set."""
    expanded = Path(name).expanduser()
    for place in (Path(), *places):
        if (place / expanded).exists():
            return [place / expanded]
        if glob.has_magic(name):
            matches = sorted(map(Path, glob.glob(str(place / expanded))))
            if matches:
                return matches
        elif paths := _named(name, place):
            return paths
    return []


def _named(name: str, place: Path) -> list[Path]:
    """Folder, archive or archives of a data set in one place."""
    for path in (place / name, *(place / f"{name}{suffix}" for suffix in ARCHIVES)):
        if path.exists():
            return [path]
    found = place.glob(f"{glob.escape(name)}-*") if _plain(name) else []
    archives = sorted(path for path in found if path.suffix.lower() in ARCHIVES)
    return [path for path in archives if archive_name(path)[0] == name]


def _plain(name: str) -> bool:
    return not any(mark in name for mark in "/\\~")


def _not_found(name: str, places: Sequence[Path]) -> str:
    expanded = Path(name).expanduser()
    if not _plain(name) or name.lower().endswith(ARCHIVES):
        siblings = sorted(p.name for p in expanded.parent.glob("*"))[:10_000]
        return (
            f"data {name} does not exist{nearest(expanded.name, siblings) or '.'} "
            f"Also looked in {_list(places)}. Data must be {FORMS}."
        )
    known = sorted({"digits", "cifar10", "cifar100", "noise", "none", *_names_in(places)})
    return (
        f"data must be {FORMS}. Got {name!r}{nearest(name, known) or '.'} Looked in "
        f"{_list(places)}; --data-root or $MPQ_DATA names another folder."
    )


def _names_in(places: Sequence[Path]) -> Iterator[str]:
    for place in places:
        for path in place.glob("*"):
            if path.is_dir():
                yield path.name
            elif path.suffix.lower() in ARCHIVES:
                yield archive_name(path)[0]


def _list(places: Sequence[Path]) -> str:
    shown = (f"{place}/" if place.is_dir() else f"{place}/ (missing)" for place in places)
    return ", ".join(shown)
