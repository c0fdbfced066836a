"""Files that mpq writes for itself with torch: each says its kind, and of which run it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq._torchfile import load_safe, save_atomic
from mpq.errors import CheckpointError, MpqError


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        format: its name, which stands in the file.
        version: what is written, and all that is read.
        must: completes "FILE must" where another kind is met, and says what to do.
        error: what is raised then.
    """

    format: str
    version: int
    must: str
    error: type[MpqError] = CheckpointError

    def save(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a file, whole or not at all; raises as `save_atomic`."""
        save_atomic({"format": self.format, "version": self.version, **content}, path)

    def marks(self, content: object) -> bool:
        """Whether what was read from a file is of this kind, in any version."""
        return isinstance(content, dict) and content.get("format") == self.format

    def read(self, path: Path) -> dict[str, Any]:
        """The content of a file; raises as `load_safe` and `checked`."""
        return self.checked(load_safe(path), path)

    def checked(self, content: Any, path: Path) -> dict[str, Any]:
        """What was read from `path`, if it is of this kind.

        Raises:
            MpqError: `error`: it is of another kind or version.
        """
        if not self.marks(content):
            raise self.error(f"{path} must {self.must}")
        if content.get("version") != self.version:
            raise self.error(
                f"{path}: version must be {self.version}. Got {content.get('version')!r} instead; "
                "a newer mpq may have written it."
            )
        found: dict[str, Any] = content
        return found

    def refuse_other_run(
        self, path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> None:
        """Name what differs between a file and the run that would go on from it.

        Raises:
            MpqError: `error`: anything differs.
        """
        old, new = _flat(saved), _flat(wanted)
        changed = [k for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
        if changed:
            listed = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in changed[:5])
            raise self.error(
                f"{path} must be of the same run to be resumed, but {listed}. Use the old "
                "settings, another folder, or start anew without resuming."
            )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat
