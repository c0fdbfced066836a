"""Static int8 quantization by other tools, for `stages.py`, which runs each in a process.

    python benchmarks/stages_peers.py TOOL FOLDER

FOLDER holds `model.pth`, `float.onnx` and `images.npy` (normalized, `[N, 3, H, W]`). Nothing of mpq
is imported: a peer may have an environment of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8


class _Reader:
    """Images one after the other, as onnxruntime's calibration asks for them."""

    def __init__(self, images: Any, name: str) -> None:
        self.feeds = ({name: images[i : i + 1]} for i in range(len(images)))

    def get_next(self) -> dict[str, Any] | None:
        return next(self.feeds, None)


def onnxruntime(folder: Path, method: str) -> None:
    """Static quantization, QDQ, signed per-channel weights, as its documentation advises."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = folder / "ready.onnx"
    quant_pre_process(folder / "float.onnx", ready, skip_symbolic_shape=True)
    name = onnx.load(ready).graph.input[0].name
    quantize_static(
        ready,
        folder / "peer.onnx",
        _Reader(np.load(folder / "images.npy"), name),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )


def nncf(folder: Path) -> None:
    """`nncf.quantize` of the ONNX file at its defaults."""
    import nncf
    import onnx

    model, images = onnx.load(folder / "float.onnx"), np.load(folder / "images.npy")
    name = model.graph.input[0].name
    feeds = [{name: images[i : i + 1]} for i in range(len(images))]
    made = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(images))
    onnx.save(made, folder / "peer.onnx")


def mct(folder: Path) -> None:
    """Post-training quantization of torchvision's network by MCT at its defaults."""
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    import model_compression_toolkit  # whose torchvision may be made for another torch
    import torchvision

    torch.set_num_threads(1)
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    images = np.load(folder / "images.npy")

    def batches() -> Iterator[list[Any]]:
        for at in range(0, len(images), BATCH):
            yield [images[at : at + BATCH]]

    model_compression_toolkit.ptq.pytorch_post_training_quantization(model.eval(), batches)


TOOLS = {
    "onnxruntime minmax": lambda folder: onnxruntime(folder, "MinMax"),
    "onnxruntime percentile": lambda folder: onnxruntime(folder, "Percentile"),
    "nncf": nncf,
    "mct": mct,
}


if __name__ == "__main__":
    TOOLS[sys.argv[1]](Path(sys.argv[2]))
