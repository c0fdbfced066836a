"""The runtime's own 8-bit quantization of a float model: what a result must be held against.

Both are written with the tool's documented settings for CPUs, so that the comparison is fair.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpq.errors import ExportError
from mpq.export.feeds import Feed, feeds, fixed_batch, parts
from mpq.export.runtime import quantize_dynamic, quantize_static, session, version

CALIBRATION_BATCH = 32


def onnxruntime_static(float_file: Path, out: Path, images: Feed) -> Path:
    """Write the static int8 form of `float_file`: QDQ, U8S8, per channel, MinMax.

    Args:
        float_file: a float ONNX model.
        out: the file to write.
        images: calibration images as the model takes them, normalized float32 `[n, C, H, W]`, or
            arrays in the order of its inputs.

    Raises:
        ExportError: the tool cannot quantize this model.
    """
    loaded = session(float_file)
    given, step = feeds(loaded, images), fixed_batch(loaded) or CALIBRATION_BATCH
    total = max(len(array) for array in given.values() if array.ndim)
    batches = list(parts(given, total - total % step or total, step))
    return _write(out, float_file, lambda part: quantize_static(float_file, part, batches))


def onnxruntime_dynamic(float_file: Path, out: Path) -> Path:
    """Write the dynamic int8 form of `float_file` (see `onnxruntime_static`).

    Its activation ranges are those of the batch at hand, so its accuracy depends a little on which
    images share a batch.
    """
    return _write(out, float_file, lambda part: quantize_dynamic(float_file, part))


def _write(out: Path, source: Path, quantize: Callable[[Path], Any]) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder) / out.name
        try:
            quantize(part)
        except OSError:
            raise
        except Exception as error:  # the tool raises whatever its parts raise
            raise ExportError(
                f"onnxruntime {version()} cannot quantize {source} itself: {error}. "
                f"Leave the comparison out with --no-peers."
            ) from error
        os.replace(part, out)
    return out
