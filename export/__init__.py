"""The back end: a prepared or frozen graph becomes one ONNX file, certified and verified.

`to_onnx` is the whole of it. `mpq.export.certify` and `mpq.export.verify` are its two judges,
`mpq.export.bench` compares files. Nothing here knows how a policy was found or trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpq.verb import callable_package

if TYPE_CHECKING:
    from .onnx_file import ExportResult, float_to_onnx, to_onnx

__all__ = ["ExportResult", "float_to_onnx", "to_onnx"]
callable_package(__name__)


def __getattr__(name: str) -> object:
    """Import on first use: `mpq bench` uses this package without torch."""
    if name in __all__:
        from . import onnx_file

        return getattr(onnx_file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
