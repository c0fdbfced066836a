"""What code a run has been trusted to import: `trusted.json`, sealed by the user who trusted it.

Beside each name stands the hash of its file, so that a changed file is seen. A run may come from
somebody else, and so may the memory in it: every entry carries a seal, an HMAC under a key that
lies in the user's own state folder and in no run. An entry without a valid seal is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from mpq.files import write_json

logger = logging.getLogger(__name__)
FILE = "trusted.json"
KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Recalled:
    """A name that the run was trusted with, its file, and whether that is unchanged; None: gone."""

    file: str
    unchanged: bool | None


def is_name(name: str) -> bool:
    """Whether a name has the form `package.module:function`, and can be typed as it stands."""
    return _NAME.fullmatch(name) is not None


def recalled(folder: Path, name: str) -> Recalled | None:
    """What a run remembers of a name; None where nothing that this user has sealed."""
    entry = _entries(folder).get(name)
    if entry is None:
        return None
    now = _code(name)[1]
    return Recalled(entry["file"], entry["sha256"] == now if now else None)


def remember(folder: Path, names: Iterable[str], runs: Iterable[Path] = ()) -> None:
    """Add names to the memory of a run, and what other runs remember unchanged.

    A memory that cannot be written costs a question, never the run.
    """
    kept = _entries(folder)
    found = {**kept}
    for run in runs:
        found |= {n: e for n, e in _entries(run).items() if n not in found}
    for name in filter(is_name, names):
        file, digest = _code(name)
        if digest:
            found[name] = _sealed(name, {"file": file, "sha256": digest})
    if found == kept:
        return
    try:
        write_json(folder / FILE, found)
    except OSError as error:
        logger.warning("%s cannot be written: %s", folder / FILE, error.strerror)


def _entries(folder: Path) -> dict[str, dict[str, str]]:
    """The entries of a run's memory that bear this user's seal."""
    try:
        found = json.loads((folder / FILE).read_bytes()[:1_000_000])
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: entry for name, entry in entries if _is_sealed(name, entry)}


def _is_sealed(name: str, entry: Any) -> bool:
    keys = ("file", "sha256", "seal")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in keys):
        return False
    right = _sealed(name, {"file": entry["file"], "sha256": entry["sha256"]})["seal"]
    return hmac.compare_digest(right.encode(), entry["seal"].encode())


def _sealed(name: str, entry: dict[str, str]) -> dict[str, str]:
    sealed = json.dumps([name, entry["file"], entry["sha256"]]).encode()
    return {**entry, "seal": hmac.new(_key(), sealed, hashlib.sha256).hexdigest()}


def _key() -> bytes:
    """This user's key, made at first use; one of this process alone where none can be kept."""
    path = state_folder() / "trust.key"
    try:
        if not path.is_file():
            _make_key(path)
        kept = path.read_bytes()
    except OSError as error:
        logger.info("what is trusted is not kept: %s: %s", path, error.strerror)
        return _PASSING
    return kept if len(kept) == KEY_BYTES else _PASSING


def _make_key(path: Path) -> None:
    """Put a key there; of two processes that do so at the same time, one prevails."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent) as part:  # for its owner only
        part.write(secrets.token_bytes(KEY_BYTES))
        part.flush()
        with contextlib.suppress(FileExistsError):
            os.link(part.name, path)


_PASSING = secrets.token_bytes(KEY_BYTES)


def state_folder() -> Path:
    """Where mpq keeps what is the user's own: `$XDG_STATE_HOME/mpq` or `~/.local/state/mpq`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mpq"


def _code(name: str) -> tuple[str, str]:
    """The file of a name's module, and the SHA-256 of it and of the packages that it is in.

    Both are empty where there is no such file (a module in C that is part of Python).
    """
    files = _files(name.partition(":")[0])
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
    except OSError:
        return "", ""
    return (files[-1], digest.hexdigest()) if files else ("", "")


def _files(module: str) -> list[str]:
    """Where a module and its packages lie, outermost first, without running any of them."""
    path = [os.getcwd(), *sys.path]  # as `mpq.userimport` looks for them
    found: list[str] = []
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        spec: ModuleSpec | None = PathFinder.find_spec(name, path)
        if spec is None:
            return []
        if spec.origin and spec.has_location:
            found.append(spec.origin)
        path = list(spec.submodule_search_locations or [])
    return found
