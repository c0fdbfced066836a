"""Which form a file takes: how narrow weights are stored in it, and what that asks of a runtime.

`cast`: a 4-bit weight is INT4 -> Cast(INT8), folded at load, from onnxruntime 1.23 on; likewise
INT2 where the oldest runtime that is named takes it. `unpack`: packed bytes and bit operations that
fold at load, any width, opset 18 (21 where activations are rounded to 16 bits). `dq`: INT4 straight
into DequantizeLinear, the form of the ONNX
specification for runtimes that have a kernel for it; onnxruntime decodes it at every run. What each
version takes was measured: benchmarks/runtimes.py, tests/test_forms.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, cast, get_args

import onnx

from mpq.errors import UsageError
from mpq.target import Target
from mpq.targets import each

Int4Format = Literal["cast", "unpack", "dq"]
INT4_FORMATS: tuple[str, ...] = get_args(Int4Format)
Version = tuple[int, int]
OLDEST: Version = (1, 18)
"""Older runtimes were not tried."""
INT4_CAST: Version = (1, 23)
INT4_DECODED: Version = (1, 20)
INT2_CAST: Version = (1, 26)
BYTE_SHUFFLE: Version = (1, 23)
"""DepthToSpace of uint8: 1.20 lacks it."""
NEEDS, INT4 = "mpq.needs", "mpq.int4"
"""Keys of `metadata_props`: what the file asks of a runtime, and `int4` where the opset does not
tell it."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a file is written.

    Args:
        int4: storage of 4-bit weights.
        int2: store 2-bit weights as INT2 and a Cast; otherwise they are packed bytes.
        opset: of the file.
        ir: version of the ONNX format.
        needs: the oldest onnxruntime that takes it.
    """

    int4: Int4Format = "cast"
    int2: bool = False
    opset: int = 21
    ir: int = 10
    needs: Version = INT4_CAST

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        said = {NEEDS: f"onnxruntime>={self.needs[0]}.{self.needs[1]}"}
        default = "unpack" if self.opset == 18 else "cast"
        return said | ({INT4: self.int4} if self.int4 != default else {})


def choose_form(
    widths: Collection[int],
    *,
    int4_format: Int4Format | None = None,
    min_runtime: str | None = None,
    rounds_16: bool = False,
    shuffles: bool = False,
    target: Target | None = None,
) -> Form:
    """The form for weights of these widths.

    Args:
        widths: widths of the weights in the file, in bits.
        int4_format: storage of 4-bit weights; None: `cast` where the runtime takes it.
        min_runtime: the oldest onnxruntime that must run the file, e.g. `1.18`; None: 1.23.
        rounds_16: activations are rounded to 16 bits, for which opset 18 has no type.
        shuffles: integers are interleaved, for which new runtimes have an operation.
        target: where the file must run; None: any onnxruntime.

    Raises:
        UsageError: a version that is none or is too old, or a format that it or the target does
            not take.
    """
    oldest = None if min_runtime is None else _version(min_runtime)
    if oldest is not None and oldest < OLDEST:
        raise UsageError(
            f"--min-runtime must be at least {_text(OLDEST)}. Got {min_runtime} instead: files of "
            "mpq were not tried on older runtimes."
        )
    if int4_format is None:
        int4_format = "unpack" if oldest is not None and oldest < INT4_CAST else "cast"
    if 4 in widths and target is not None:
        _check(int4_format, target, min_runtime)
    if 2 in widths and oldest is not None and oldest >= INT2_CAST:
        return Form(int4_format, int2=True, opset=25, ir=13, needs=INT2_CAST)
    if int4_format == "unpack" or (4 not in widths and oldest is not None):
        opset, version = (21, 10) if rounds_16 else (18, 8)
        return Form(int4_format, opset=opset, ir=version, needs=OLDEST)
    if int4_format == "cast" and 4 in widths:
        if oldest is not None and oldest < INT4_CAST:
            raise UsageError(
                f"--int4-format cast needs onnxruntime {_text(INT4_CAST)} or newer, but "
                f"--min-runtime is {min_runtime}. Use --int4-format unpack."
            )
        return Form(int4_format)
    if shuffles and oldest is None:
        return Form(int4_format, needs=BYTE_SHUFFLE)
    return Form(int4_format, needs=INT4_DECODED if 4 in widths else OLDEST)


def form_of(model: onnx.ModelProto) -> Form | None:
    """The form that a file of mpq is written in; None where it does not say so."""
    metadata = {p.key: p.value for p in model.metadata_props}
    match = re.fullmatch(r"onnxruntime>=(\d+)\.(\d+)", metadata.get(NEEDS, ""))
    if not match:
        return None
    opset = next((o.version for o in model.opset_import if not o.domain), 0)
    int4 = metadata.get(INT4, "unpack" if opset == 18 else "cast")
    if int4 not in INT4_FORMATS:
        return None
    needs = int(match.group(1)), int(match.group(2))
    return Form(cast(Int4Format, int4), opset == 25, opset, model.ir_version, needs)


def _check(int4_format: Int4Format, target: Target, min_runtime: str | None) -> None:
    """Refuse a storage of 4-bit weights that a target decodes in float."""
    refusing = [t.name for t in each(target) if int4_format not in t.int4_formats]
    if refusing:
        asked = "--int4-format" if min_runtime is None else f"--min-runtime {min_runtime}"
        raise UsageError(
            f"target {refusing[0]} needs 4-bit weights in the form "
            f"{' or '.join(sorted(target.int4_formats))}, but {asked} asks for {int4_format}, "
            "whose layers run in float there. Leave one of the two out, or write two files."
        )


def _version(text: str) -> Version:
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)?", text.strip())
    if not match:
        raise UsageError(
            f"--min-runtime must be a version of onnxruntime such as 1.18. Got {text!r} instead."
        )
    return int(match.group(1)), int(match.group(2))


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
