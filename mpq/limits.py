"""How much is read of files that may come from anybody: checked before they are opened.

`mpq --limit NAME=VALUE COMMAND ...` changes one; in Python, `mpq.limits.limited`.
"""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpq.errors import MpqError, UsageError, nearest


@dataclass(frozen=True)
class Limits:
    """What is read at most.

    Args:
        file_mb: of a checkpoint or a model file, and of the weights in it, in MB.
        text_mb: of a policy, a recipe or a JSON file of a run, in MB.
        image_mb: of the file of one image, in MB.
        megapixels: of one image.
        input_megapixels: of the images that a network says it takes.
        classes: of a network.
        arrays_mb: of decoded images that are held in memory; more are streamed from their files.
        stream_samples: of a stream, from which a sample of it is drawn.
        cache_mb: of decoded images and latency profiles that are kept, in MB.
        yaml_values: values in a YAML text, those that an alias repeats counted each time.
        onnx_mb: for a model file to run one image, beside four times its size, where that cannot be
            told from the file alone; a quarter, beside 64 times its size, for what is constant.
        onnx_seconds: for such a file to be loaded and run once.
    """

    file_mb: float = 8000.0
    text_mb: float = 8.0
    image_mb: float = 64.0
    megapixels: float = 50.0
    input_megapixels: float = 4.2
    classes: float = 100_000.0
    arrays_mb: float = 2000.0
    stream_samples: float = 10_000.0
    cache_mb: float = 20_000.0
    yaml_values: float = 100_000.0
    onnx_mb: float = 500.0
    onnx_seconds: float = 60.0


_DEFAULT = Limits()
_limits: ContextVar[Limits] = ContextVar("limits", default=_DEFAULT)


def current() -> Limits:
    """The limits that hold now."""
    return _limits.get()


@contextlib.contextmanager
def limited(**values: float) -> Iterator[None]:
    """Let other limits hold while the block runs."""
    token = _limits.set(replace(_limits.get(), **values))
    try:
        yield
    finally:
        _limits.reset(token)


def set_limit(text: str) -> None:
    """Change one from here on, as `--limit` says it: `file-mb=20000`.

    Raises:
        UsageError: an unknown name, or a value that is no number above 0.
    """
    known = [field.name.replace("_", "-") for field in fields(Limits)]
    name, _, value = text.partition("=")
    if name not in known:
        raise UsageError(
            f"--limit must be NAME=VALUE with one of {', '.join(known)}. Got {text!r}"
            f"{nearest(name, known)}"
        )
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise UsageError(f"--limit {name} must be a number above 0. Got {value!r}.")
    _limits.set(replace(_limits.get(), **{name.replace("-", "_"): number}))


def exceeded(what: str, limit: str, got: str) -> str:
    """What is said of what is too large; `limit` is the name of an argument of `Limits`."""
    most, name = getattr(current(), limit), limit.replace("_", "-")
    return (
        f"{what} exceeds the limit {name}={most:g}: {got}. If it is what it should be, raise the "
        f"limit: mpq --limit {name}=VALUE ..."
    )


def check_file(path: Path, limit: str, error: type[MpqError]) -> None:
    """Refuse what is no regular file (a device, a pipe), and what is larger than a limit.

    What does not exist and folders pass: whoever opens them has the better message.

    Args:
        path: the file.
        limit: `file_mb`, `text_mb` or `image_mb`.
        error: what to raise.

    Raises:
        MpqError: as `error`.
    """
    try:
        found = path.stat()
    except OSError:
        return
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} must be a regular file. Got a device or a pipe.")
    if found.st_size > getattr(current(), limit) * 1e6:
        raise error(exceeded(str(path), limit, f"it has {found.st_size / 1e6:,.1f} MB"))


def read_text(path: Path, error: type[MpqError]) -> str:
    """The text of a small file, as UTF-8.

    Raises:
        MpqError: as `error`: no regular file, or too large a one.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    check_file(path, "text_mb", error)
    return path.read_text(encoding="utf-8")


def read_named(path: str | Path, error: type[MpqError], missing: str, remedy: str) -> str:
    """The text of a file that a user has named.

    Args:
        path: the file.
        error: raised with one message.
        missing: what to say where there is no such file.
        remedy: what to do where there is none, or none of text.
    """
    try:
        return read_text(Path(path), error)
    except FileNotFoundError:
        raise error(f"{missing} {remedy}") from None
    except (OSError, UnicodeDecodeError) as wrong:
        why = getattr(wrong, "strerror", "it is no text file")
        raise error(f"{path} cannot be read: {why}. {remedy}") from None


def read_json(path: Path, error: type[MpqError], writer: str) -> Any:
    """Content of a JSON file; of `.jsonl` its lines, None where there are none.

    Args:
        path: the file.
        error: raised with one message.
        writer: the command that writes such files.
    """
    try:
        text = read_text(path, error)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line] or None
        return json.loads(text)
    except (ValueError, RecursionError) as wrong:
        raise error(
            f"{path} must be as `{writer}` writes it. It is not JSON: {wrong}. Write it again, or "
            "remove it."
        ) from None
