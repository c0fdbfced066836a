"""Tar archives of pictures: shards as WebDataset writes them, or folders packed as they are.

Only headers are read to find the members; a member is then read by its place, so that any process
can read any sample, in any order, without going through the archive. In a shard the class id of
`KEY.jpg` is the text of `KEY.cls` (https://github.com/webdataset/webdataset).
"""

from __future__ import annotations

import os
import tarfile
from functools import cached_property
from pathlib import Path

from mpq.data.images import is_image
from mpq.errors import DataError
from mpq.limits import current, exceeded

LABEL = ".cls"


class Tar:
    """A tar archive without compression.

    Raises:
        DataError: the file is no complete tar archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if member.isreg():
                        place = member.offset_data, member.size
                        self._members[member.name.removeprefix("./")] = place
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise DataError(self._incomplete(str(error))) from error
        end = max((at + size for at, size in self._members.values()), default=0)
        if not self._ends(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE):
            raise DataError(self._incomplete("its end is missing"))

    def _ends(self, at: int) -> bool:
        """Whether the block of zeros that ends an archive stands there: one cut short has none."""
        with self.path.open("rb") as file:
            file.seek(at)
            return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)

    def _incomplete(self, reason: str) -> str:
        return (
            f"{self.path} must be a complete tar archive without compression. Got "
            f"{self.path.stat().st_size:,} bytes: {reason}. It may be cut short (copy or download "
            "it again), or compressed (unpack it with gzip -d: pictures are compressed already)."
        )

    def names(self) -> list[str]:
        """See `Container.names`."""
        return sorted(filter(is_image, self._members))

    def read(self, name: str) -> bytes:
        """See `Container.read`.

        Raises:
            DataError: the archive has become shorter, or the member is too large.
        """
        at, size = self._members[name]
        if size > current().image_mb * 1e6:
            where = f"{name} in {self.path}"
            raise DataError(exceeded(where, "image_mb", f"it has {size / 1e6:,.1f} MB"))
        try:
            with self.path.open("rb") as file:
                file.seek(at)
                found = file.read(size)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(found) < size:
            raise DataError(self._incomplete(f"{name} ends at {at + size:,}"))
        return found

    def stamp(self, names: list[str]) -> list[tuple[str, int, int]]:
        """See `Container.stamp`: the archive speaks for all its members."""
        stat = os.stat(self.path)
        return [(self.path.name, stat.st_size, stat.st_mtime_ns)]

    @cached_property
    def classes(self) -> dict[str, int]:
        """Class ids by name of image, where they lie beside the images.

        Raises:
            DataError: some images have one and others not, or a file that holds no class id.
        """
        names = self.names()
        beside = {name: _key(name) + LABEL for name in names}
        found = {name: self._class_id(cls) for name, cls in beside.items() if cls in self._members}
        if found and len(found) < len(names):
            alone = next(name for name in names if name not in found)
            raise DataError(
                f"{self.path} must have a class id beside each image or none. {alone} has none: "
                f"it must be in {beside[alone]}. The archive may be cut short."
            )
        return found

    def _class_id(self, name: str) -> int:
        text = self.read(name).strip()
        if not text.isdigit():
            raise DataError(
                f"{name} in {self.path} must hold a class id (0, 1, ...). Got {text[:20]!r}."
            )
        return int(text)


def _key(name: str) -> str:
    """All before the first dot of the file's name, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
