"""Networks from `.pt2` files, as `torch.export.save` writes them.

A program of `torch.export` is a module like any other, and is recorded like one: its parameters lie
at their paths, and its calls are named in Python (`mpq.capture.overloads`).

`torch.export.load` may run code from a file: it unpickles weights, constants and sample inputs,
evaluates the expressions of sizes, and calls whatever function a node names. All of that is looked
at before, and what is not plain data, arithmetic of sizes and operators of torch is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mpq.capture.network import Network
from mpq.errors import CheckpointError

_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
)
_TARGET = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_?operator\.\w+|math\.\w+|torch\._?sym_\w+")
_NAME = re.compile(
    r"[suz]\d+|Add|Mul|Rational|Mod|PythonMod|FloorDiv|CleanDiv|CeilToInt|FloorToInt|TruncToInt|IntTrueDiv|"
    r"FloatTrueDiv|ToFloat|Max|Min|Eq|Ne|Ge|Gt|Le|Lt|And|Or|Not|True|False|int_oo|oo|"
    r"ceiling|floor|Pow|PowByNatural|Abs|Integer|Symbol|positive|integer"
)
_ARITHMETIC = re.compile(r"[\w\s+\-*/%(),<>=!&|~^]*")
_LARGEST_JSON = 512 * 1024 * 1024


def open_exported(path: str | Path) -> Network:
    """The network of a `.pt2` file, with the inputs that it was exported with.

    Raises:
        CheckpointError: the file is missing or no `.pt2`, would run code, or has no sample inputs.
    """
    path = Path(path)
    content = _checked(path)
    try:
        program = torch.export.load(io.BytesIO(content))
        module = program.module(check_guards=False)
    except Exception as error:
        raise _unusable(path, str(error).partition("\n")[0]) from error
    if program.example_inputs is None:
        raise _unusable(path, "it holds no sample inputs")
    args, kwargs = program.example_inputs
    # A program's own module knows no eval(); the module made from it does.
    return Network(fx.GraphModule(module, module.graph), tuple(args), dict(kwargs))


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} must be a program that torch.export.save of torch {torch.__version__} wrote, with "
        f"plain weights: {why}. Export the network anew, or give its module and a state dict."
    )


def _checked(path: Path) -> bytes:
    """The bytes of a file that runs no code when it is loaded."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            wrong = next(_dangers(archive), "")
    except (zipfile.BadZipFile, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise _unusable(path, f"it cannot be read ({error})") from None
    if wrong:
        raise _unusable(path, wrong)
    return content


def _dangers(archive: zipfile.ZipFile) -> Iterator[str]:
    """What of an archive could run code."""
    names = [name.partition("/") for name in archive.namelist()]
    if len({root for root, _, _ in names}) != 1 or len(set(names)) != len(names):
        yield "it is not one folder of files"
    for root, _, name in names:
        if not _MEMBER.fullmatch(name):
            yield f"{name} is not one of its parts"
        if name.endswith(".json"):
            if archive.getinfo(f"{root}/{name}").file_size > _LARGEST_JSON:
                yield f"{name} is too large"
            yield from _dangers_of_json(json.loads(archive.read(f"{root}/{name}")))
        if name.endswith(".pt"):
            try:
                torch.load(io.BytesIO(archive.read(f"{root}/{name}")), weights_only=True)
            except Exception:
                yield f"{name} is a pickle that would run code"


def _dangers_of_json(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for part in value:
            yield from _dangers_of_json(part)
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        if key == "use_pickle" and part is not False:
            yield "its weights are pickled"
        elif key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(part)):
            yield f"it holds an object of its own, {part}"
        elif key == "target" and isinstance(part, str) and not _TARGET.fullmatch(part):
            yield f"it calls {part}"
        elif key in ("expr_str", "as_expr") and isinstance(part, str) and not _is_arithmetic(part):
            yield f"a size is given as {part!r}"
        yield from _dangers_of_json(part)


def _is_arithmetic(text: str) -> bool:
    text = re.sub(r"'([suz]\d+)'", r"\1", text)  # Symbol('s0', positive=True)
    names = re.findall(r"[A-Za-z_]\w*", text)
    return bool(_ARITHMETIC.fullmatch(text)) and all(map(_NAME.fullmatch, names))
