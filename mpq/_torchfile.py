"""`torch.load` and `torch.save` for files that people hand over.

No file can run code unless it is trusted, none is left half-written, and of one that cannot be
read the message says what it is instead.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path, PosixPath, WindowsPath
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mpq import limits
from mpq.errors import CheckpointError, MpqError, nearest
from mpq.files import atomic_file
from mpq.userimport import working_directory

# Beside tensors, what training scripts save and what cannot run code when it is unpickled.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    PosixPath,
    WindowsPath,
    np.dtype,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
]

MOST_RATIO = 4
"""A torch archive holds its tensors as they are: all members may be so many times its size."""

_MAGIC = (
    (b"\x89HDF", "an HDF5 file, as Keras writes it"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the real file with `git lfs pull`"),
    (b"<", "a web page or XML file: the download went wrong"),
    (b"{", "a JSON file"),
)


def load_safe(path: str | Path, *, trust_pickle: bool = False) -> Any:
    """`torch.load` to the CPU, without running code from the file unless that is trusted.

    Of safetensors and of a trusted TorchScript archive: the state dict.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not of torch, or would run code.
    """
    path = Path(path)
    kind = _check_file(path)
    try:
        imports = working_directory() if trust_pickle else contextlib.nullcontext()
        with torch.serialization.safe_globals(_HARMLESS), imports, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old formats are of no use here
            if kind == "safetensors":
                return _safetensors(path)
            if kind == "script":
                return _script_state(path, trust_pickle=trust_pickle)
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except MpqError:
        raise
    except Exception as error:  # unpickling may raise anything
        raise CheckpointError(_explain(path, error, trust_pickle=trust_pickle)) from error
    if isinstance(content, dict) and str(content.get("format")).startswith("mpq/"):
        _check_sums(path)
    return content


def save_atomic(obj: Any, path: str | Path) -> None:
    """`torch.save` to a temporary file beside `path`, then rename: all or nothing.

    Raises:
        CheckpointError: the folder is missing or not writable, the disk is full.
    """
    path, failed = Path(path), list[OSError]()
    try:
        with atomic_file(path) as file:
            torch.save(obj, _Telling(file, failed))  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the first into the second
        cause = failed[0] if failed else error
        why = getattr(cause, "strerror", None) or cause
        raise CheckpointError(
            f"{path} cannot be written: {why}. Its folder must exist, be writable and have room."
        ) from error


class _Telling:
    """A file that keeps the error of a failed write; torch's writer tells only positions."""

    def __init__(self, file: BinaryIO, failed: list[OSError]) -> None:
        self.file, self.failed = file, failed

    def write(self, data: Any) -> int:
        """As of the file."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed.append(error)
            raise

    def flush(self) -> None:
        """As of the file."""
        self.file.flush()


def is_exported(path: Path) -> bool:
    """Whether a file is a program that `torch.export.save` wrote."""
    return path.is_file() and zipfile.is_zipfile(path) and "archive_format" in _members(path)


def _members(path: Path) -> set[str]:
    """Names in a zip archive, below its one folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.partition("/")[2] for name in archive.namelist()}
    except Exception:  # zipfile raises what it stumbles over
        return set()


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {path} ({path.stat().st_size} bytes) is a safetensors file, but "
            f"damaged or truncated: {error}. Fetch or save it again."
        ) from error


def _script_state(path: Path, *, trust_pickle: bool) -> dict[str, Tensor]:
    """The weights of a TorchScript archive; its operations can be had by no public function."""
    if trust_pickle:
        return dict(torch.jit.load(path, map_location="cpu").state_dict())
    raise CheckpointError(
        f"the checkpoint {path} is a TorchScript archive, whose operations no public function of "
        "torch gives. Where the network was made, write it with torch.export.save (.pt2). For its "
        "weights alone, give --trust-pickle (torch.jit.load may run code of the file) and --model."
    )


def _check_file(path: Path) -> str:
    """What is to be read: `torch`, `safetensors` or `script`."""
    try:
        if not path.exists():
            around = path.parent.iterdir() if path.parent.is_dir() else ()
            hint = nearest(path.name, [p.name for p in around])
            raise CheckpointError(f"the checkpoint {path} does not exist{hint}")
        if path.is_dir():
            raise CheckpointError(f"the checkpoint {path} must be a file. Got a folder instead.")
        limits.check_file(path, "file_mb", CheckpointError)
        what = _other_kind(path)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
    if what in ("safetensors", "script", None):
        return what or "torch"
    raise CheckpointError(
        f"the checkpoint {path} must be a file that torch.save wrote (.pth, .pt, .ckpt) or one of "
        f"safetensors. This one is {what}."
    )


def _check_sums(path: Path) -> None:
    """Hold every part of an archive of ours against its checksum, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises what it stumbles over
        broken = f"a part ({error})"
    if broken is not None:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: the checksum of {broken} is wrong. Copy or write "
            "it again."
        )


def _explain(path: Path, error: Exception, *, trust_pickle: bool) -> str:
    first = str(error).strip().partition("\n")[0] or "it ends too early"
    if trust_pickle and isinstance(error, AttributeError | ImportError):
        return (
            f"the checkpoint {path} needs code that cannot be imported here: {first}. Run from the "
            "folder of that code, install it (pip install ultralytics for a YOLO), or save "
            "`model.state_dict()` there and pass --model."
        )
    blocked = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and blocked:
        return (
            f"the checkpoint {path} holds Python objects ({blocked[1]}), such as a whole pickled "
            f"module; loading them can run any code, so it is refused. Save `model.state_dict()` "
            f"instead, or, if you trust the file's origin, pass --trust-pickle."
        )
    return (
        f"the checkpoint {path} ({path.stat().st_size} bytes) is damaged, truncated or not a file "
        f"that torch.save wrote: {type(error).__name__}: {first}. Fetch or save it again."
    )


def _other_kind(path: Path) -> str | None:
    """What the file is instead of a torch checkpoint; None if it may be one."""
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "empty (0 bytes)"
    if head.startswith(b"PK"):
        return _zip(path)
    for magic, what in _MAGIC:
        if head.lstrip().startswith(magic):
            return what
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "safetensors"
    if path.suffix == ".onnx" or (head[0] == 8 and b"\x12" in head[1:4]):
        return (
            "an ONNX file: mpq starts from the PyTorch network that it was exported from, because "
            "it trains and scores that; an ONNX graph has no modules that could be trained"
        )
    return "a text file" if _is_text(head) else None


def _zip(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        return "truncated: it begins as a torch archive but its end is missing; fetch it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            inside, size = sum(i.file_size for i in archive.infolist()), path.stat().st_size
    except Exception as error:  # zipfile raises what it stumbles over
        return f"a torch archive with a damaged directory ({error}): fetch it again"
    if inside > MOST_RATIO * size:
        return (
            f"a zip archive of {size / 1e6:,.1f} MB that says it holds {inside / 1e6:,.1f} MB; "
            "torch.save does not compress: unpack it, and save its tensors with torch.save"
        )
    if "constants.pkl" in names:
        return "script"
    if "archive_format" in names:
        return "an exported program (.pt2), which mpq analyze and mpq profile take as their network"
    return None if "data.pkl" in names else "a zip archive, but not one that torch.save wrote"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else a letter cut in two at the end
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\n\r\f" for c in text)
