"""OpenVINO as a peer of the speed table: its own int8 form of a float file.

No dependency of mpq: what it takes is named where it is missing. The model is quantized by NNCF,
which is how OpenVINO quantizes, at its defaults, and compiled for the CPU at the defaults of the
runtime but for its threads. A float operation that is left may run in bfloat16 there, where the
CPU has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("openvino", "nncf")


def missing() -> str:
    """What to do where a package is absent; empty where all are there."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return ""
    return (
        f"--openvino needs {' and '.join(absent)}, which mpq does not depend on. Install with: "
        f"pip install {' '.join(absent)}"
    )


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    return {name: version(name) for name in PACKAGES}


def quantize(float_file: Path, out: Path, images: NDArray[np.float32], *, batch: int = 1) -> Path:
    """Write the int8 form of a float ONNX file for one batch, as `out` (.xml) and a .bin beside it.

    Args:
        float_file: a float ONNX model.
        out: the .xml to write.
        images: calibration images `[n, C, H, W]`.
        batch: that the form is fixed to.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(float_file)
    model.reshape([1, *images.shape[1:]])
    singles = [images[i : i + 1] for i in range(len(images))]
    int8 = nncf.quantize(model, nncf.Dataset(singles), subset_size=len(singles))
    int8.reshape([batch, *images.shape[1:]])
    openvino.save_model(int8, out)
    return out


def runner(path: Path, *, threads: int = 1) -> Callable[[], object]:
    """A compiled model as a function of nothing: one run on noise of a fixed seed."""
    import openvino

    one = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", one).create_infer_request()
    shape = list(request.model_inputs[0].shape)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    request.set_input_tensor(openvino.Tensor(noise))
    return lambda: request.infer()


def size(path: Path) -> int:
    """Bytes of the model: its graph and its weights."""
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size
