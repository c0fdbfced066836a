"""Stage folders: begun, gone on with, finished once, and known again.

A stage lies in `NAME-KEY/`. `stage.json` says what it is and which code made it; `done.json` is
written last, whole or not at all, so that a kill at any moment leaves a stage finished or not. A
plan part that changes has another key and so another folder: nothing is overwritten.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import mpq
from benchmarks.study.stages import Stage
from mpq import files
from mpq.errors import UsageError

DONE, BEGUN, PLAN = "done.json", "stage.json", "plan.json"
ELSEWHERE = ("export", "policies", "plans")
"""Folders that an installed mpq holds and an editable one does not, and what is no code."""
Result = dict[str, Any]


@cache
def code_version() -> str:
    """Short hash of the sources that compute: mpq, its back end and this study."""
    digest = hashlib.sha256()
    for file in (mpq.__file__, str(import_module("mpq.export").__file__), __file__):
        root = Path(file).parent
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
            place = path.relative_to(root)
            if place.parts[0] not in ELSEWHERE:
                digest.update(place.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Shelf:
    """The folders of a plan's stages.

    Args:
        root: the folder that holds them.
        plan: the name of the plan.
        any_code: take over what another version of the code made.

    Raises:
        UsageError: the folder belongs to another plan.
    """

    def __init__(self, root: Path, plan: str, *, any_code: bool = False) -> None:
        self.root, self.any_code = root, any_code
        root.mkdir(parents=True, exist_ok=True)
        claim(root, plan)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out.

        Raises:
            UsageError: one is at work here.
        """
        with (self.root / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.root} is in use by another run of this study. Wait for it, or name "
                    "another folder with --runs."
                ) from None
            yield

    def folder(self, stage: Stage) -> Path:
        """Where a stage works and leaves its files."""
        return self.root / stage.folder

    def result(self, stage: Stage) -> Result | None:
        """What a stage gave, or None where it is not finished or its files are gone.

        Raises:
            UsageError: it was made by another version of the code.
        """
        found = self.told(stage)
        if found is None:
            return None
        if any(not (self.folder(stage) / name).is_file() for name in found.get("files", ())):
            return None
        self._same_code(stage, found)
        return found

    def told(self, stage: Stage) -> Result | None:
        """As `result`, whichever code made it and whether its files are still there or not."""
        path = self.folder(stage) / DONE
        return _read(path) if path.is_file() else None

    def begin(self, stage: Stage) -> Path:
        """Make the folder of a stage, or find it begun.

        Raises:
            UsageError: it was begun by another version of the code.
        """
        folder = self.folder(stage)
        if (folder / BEGUN).is_file():
            self._same_code(stage, _read(folder / BEGUN))
        else:
            told = {"name": stage.name, "key": stage.key, "code": code_version()}
            files.write_json(folder / BEGUN, told)
        return folder

    def finish(self, stage: Stage, result: Result) -> Result:
        """Write what a stage gave, with the version of the code."""
        told = {"stage": stage.name, "key": stage.key, "code": code_version(), **result}
        files.write_json(self.folder(stage) / DONE, told)
        return told

    def _same_code(self, stage: Stage, found: Result) -> None:
        made, now = found.get("code"), code_version()
        if made != now and not self.any_code:
            raise UsageError(
                f"{self.folder(stage)} was made by code version {made}, and this is {now}. Take it "
                "over with --any-code (its rows name the version), or start anew in another folder "
                "with --runs."
            )


def claim(folder: Path, plan: str) -> None:
    """Note that a folder belongs to a plan.

    Raises:
        UsageError: it belongs to another, or holds something else.
    """
    path = folder / PLAN
    if path.is_file():
        owner = _read(path).get("plan")
        if owner != plan:
            raise UsageError(
                f"{folder} holds the results of plan {owner}, not of {plan}. Name another folder."
            )
        return
    if any(p for p in folder.iterdir() if not p.name.startswith(".")):
        raise UsageError(f"{folder} must be empty or of plan {plan}, but holds other files.")
    files.write_json(path, {"plan": plan})


def _read(path: Path) -> Result:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Remove it to make it anew.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold an object. Remove it to make it anew.")
    return found
