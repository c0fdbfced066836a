"""`Contents`: the files of a run, as far as they may be shown as being of it (`mpq.origins`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mpq import limits, origins, rundir
from mpq.errors import UsageError
from mpq.policy import Policy

Made = TypeVar("Made")


@dataclass(frozen=True)
class Contents:
    """A run folder.

    Raises:
        UsageError: no such folder, or nothing of a run in it.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UsageError(
                f"run folder {self.folder} does not exist. `mpq report RUN` takes a folder."
            )
        if not self.there:
            known = ", ".join(rundir.FILES)
            raise UsageError(f"{self.folder} must be a run folder, with at least one of {known}.")

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @cached_property
    def there(self) -> tuple[Path, ...]:
        """Its files but the page, in the order of the stages."""
        paths = [self.folder / name for name in rundir.FILES if name != "report.html"]
        paths += sorted(self.folder.glob("policy-*.yaml"))
        return tuple(path for path in paths if path.is_file())

    @cached_property
    def policy(self) -> Policy | None:
        """The policy; PolicyError where it cannot be read."""
        path = self.folder / "policy.yaml"
        return Policy.load(path) if path.is_file() else None

    def doubts(self) -> list[str]:
        """Why what it holds and the page would show is left out."""
        shown = [path for path in self.there if path.suffix in (".json", ".jsonl", ".onnx")]
        return [reason for reason in map(origins.doubt, shown) if reason]

    @cached_property
    def made_of(self) -> str | None:
        """The quantized network that `model.onnx` was made from; None where that is not known."""
        return origins.made_of(self.folder / "model.onnx", rundir.QUANTIZED)

    def path(self, name: str) -> Path | None:
        """A file, if it is there and of this run."""
        path = self.folder / name
        return path if path.is_file() and not origins.doubt(path) else None

    def read(self, name: str, make: Callable[[Any], Made]) -> Made | None:
        """What `make` gives of a JSON file's content (of `.jsonl`, its rows); None without it.

        Raises:
            UsageError: the file is not JSON, or lacks what every such file has.
        """
        data = self._content(name)
        if data is None:
            return None
        try:
            return make(data)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            reason = f"It lacks {error}" if isinstance(error, KeyError) else str(error)
            raise UsageError(self._not_right(name, reason)) from error

    def _content(self, name: str) -> Any:
        path = self.path(name)
        return None if path is None else limits.read_json(path, UsageError, rundir.FILES[name])

    def _not_right(self, name: str, reason: str) -> str:
        writer = rundir.FILES[name]
        return (
            f"{self.folder / name} must be as `{writer}` writes it. {reason}. "
            "Write it again, or remove it."
        )
