"""Where image files lie: a folder, a zip or a tar archive, with one face for all.

An archive's directory is read once, a member only when asked for. The open file is kept for one
process: a forked or unpickled copy opens its own, since two processes that share a file share its
position too.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from mpq.data.images import is_image
from mpq.data.tars import Tar
from mpq.errors import DataError
from mpq.limits import check_file, current, exceeded


class Container(Protocol):
    """A place with named files."""

    @property
    def path(self) -> Path:
        """The folder or the archive."""

    def names(self) -> list[str]:
        """Paths of all images below, with `/`, sorted."""

    def read(self, name: str) -> bytes:
        """Content of one file."""

    def stamp(self, names: list[str]) -> list[tuple[str, int, int]]:
        """Name, bytes and modification time (ns) of what holds these files, to detect a change."""


def open_container(path: Path) -> Container:
    """A folder or an archive as a container.

    Raises:
        DataError: nothing is there, or a file that is no complete zip archive.
    """
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise DataError(f"data folder or archive {path} does not exist.")
    if not path.is_file():
        raise DataError(f"{path} must be a folder or an archive. Got a device or a pipe.")
    return Tar(path) if path.suffix.lower() == ".tar" else Archive(path)


class Folder:
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """See `Container.names`. Links are followed."""
        found: list[str] = []
        for folder, _, files in os.walk(self.path, followlinks=True):
            below = os.path.relpath(folder, self.path).replace(os.sep, "/")
            prefix = "" if below == "." else f"{below}/"
            found.extend(prefix + file for file in files)
        return sorted(filter(is_image, found))

    def read(self, name: str) -> bytes:
        """See `Container.read`.

        Raises:
            DataError: the file cannot be read.
        """
        check_file(self.path / name, "image_mb", DataError)
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"image {self.path / name} cannot be read: {error.strerror}."
            ) from error

    def stamp(self, names: list[str]) -> list[tuple[str, int, int]]:
        """See `Container.stamp`."""
        stats = [(name, os.stat(self.path / name)) for name in names]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


class Archive:
    """A zip archive, stored or compressed.

    Raises:
        DataError: the file is no complete zip archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._pid = 0
        self._open()

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None or self._pid != os.getpid():
            try:
                self._zip, self._pid = zipfile.ZipFile(self.path), os.getpid()
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
                raise DataError(self._incomplete(error)) from error
        return self._zip

    def _incomplete(self, error: Exception) -> str:
        size = self.path.stat().st_size if self.path.exists() else 0
        return (
            f"{self.path} must be a complete zip archive. Got {size} bytes: {error}. "
            "It may be cut short (copy or download it again) or no data at all."
        )

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_zip": None, "_pid": 0}

    def names(self) -> list[str]:
        """See `Container.names`."""
        return sorted(filter(is_image, self._open().namelist()))

    def read(self, name: str) -> bytes:
        """See `Container.read`.

        Raises:
            DataError: the member is damaged, encrypted, or packed in an unknown way.
        """
        try:
            self._check(name)
            return self._open().read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise DataError(
                f"{name} in {self.path} is damaged: {error}. Copy or download the archive again."
            ) from error
        except (RuntimeError, NotImplementedError) as error:
            raise DataError(
                f"{name} in {self.path} cannot be unpacked: {error}. "
                "Write the archive again, without encryption, stored or deflated."
            ) from error

    def _check(self, name: str) -> None:
        """Refuse what would fill memory when it is unpacked."""
        size = self._open().getinfo(name).file_size
        if size > current().image_mb * 1e6:
            where = f"{name} in {self.path}"
            raise DataError(exceeded(where, "image_mb", f"it has {size / 1e6:,.1f} MB"))

    def stamp(self, names: list[str]) -> list[tuple[str, int, int]]:
        """See `Container.stamp`: the archive speaks for all its members."""
        stat = os.stat(self.path)
        return [(self.path.name, stat.st_size, stat.st_mtime_ns)]
