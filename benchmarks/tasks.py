"""Detection, segmentation, super-resolution, keywords: real weights, float against quantized.

For each network of `task_networks.py` a row for the float file, for onnxruntime's own static int8
(min-max and percentile) and for mpq at several widths, all calibrated on the same unlabelled
inputs: the task's own metric, agreement with the float network, bytes, how many times faster, how
many layers run as integers, and whether the file answers as its simulation. `held dB` is the
agreement of all outputs on 32 pictures of ImageNet that nothing is calibrated or trained on.

A row is `float`, `minmax` or `percentile` (onnxruntime's), or widths: `w8a8`, `w4a8`, `w8a16`
(inputs of layers stay float), `8/4` or `8/6/5/4/3` (4.8 bits of these, as analyzed). Behind them
stands ` fast` for `--effort fast`, ` qat` for training where the float network teaches, ` split`
and ` split qat` for the same with signs apart (`split_signs.py`), or ` seed1` for another four
fifths of the inputs to calibrate on. `rho` is the rank correlation of scores against measured
divergence, `rho feedback` that of scores with weights rounded as `mpq ptq` does.

    MPQ_DATA=... python benchmarks/tasks.py detect w8a8 "8/4 qat" rho --epochs 4 --out runs/tasks
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import setting
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from split_signs import split_signs
from task_networks import TASKS, Answers, decibels
from torch import Tensor

import mpq
from mpq.errors import ExportError
from mpq.export.bench import file_bytes, interleave
from mpq.export.onnx_file import float_to_onnx
from mpq.graph.passes import to_float
from mpq.targets import this_target

CALIBRATION = {"minmax": "MinMax", "percentile": "Percentile"}
VERIFIED = 16
"""Inputs on which a file is held against its simulation."""
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8), "w8a16": (8, 16)}
SELF_TAUGHT = {
    "optimizer": "adamw",
    "lr": 2e-4,
    "step_lr": 0.3,
    "weight_decay": 0.0,
    "batch": 8,
    "temperature": 1.0,
    "crop": 0.0,
    "norm": "folded",
}
"""What differs from the recipe `qat`: few pictures, and losses that begin near zero."""


# -- files -----------------------------------------------------------------------------------------


def session(path: Path) -> onnxruntime.InferenceSession:
    """One thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers_of(path: Path, inputs: list[Tensor]) -> Answers:
    """What a file answers."""
    loaded = session(path)
    name = loaded.get_inputs()[0].name
    return [loaded.run(None, {name: x.numpy()}) for x in inputs]


def runtimes_own(source: Path, out: Path, images: Tensor, method: str) -> Path:
    """The runtime's own static int8: QDQ, U8S8, per channel, 7-bit weights without VNNI."""
    name = session(source).get_inputs()[0].name

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        left = iter(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            return next(({name: x.numpy()} for x in self.left), None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=this_target().saturates,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, CALIBRATION[method]),
    )
    prepared.unlink()
    return out


class Bench:
    """Makes and measures the files of one task."""

    def __init__(self, name: str, out: Path, epochs: int = 4) -> None:
        self.epochs = epochs
        self.name, self.task, self.out = name, TASKS[name](), out / name
        self.out.mkdir(parents=True, exist_ok=True)
        self.network = self.task.network()
        self.unlabelled, self.inputs = self.task.unlabelled(), self.task.inputs()
        self.float_file = self.out / "float.onnx"
        graph = to_float(self.network, self.unlabelled[:2])
        float_to_onnx(graph, self.float_file, dynamic=self.task.free)
        self.reference = answers_of(self.float_file, self.inputs)

    def analyze(
        self, bits: Sequence[int] = (8, 4), validate: int = 0, rounding: str = "nearest"
    ) -> Any:
        """The scores, and the policy of 4.8 bits."""
        images, held = self.unlabelled, len(self.unlabelled) // 4
        if validate:
            return mpq.analyze(self.network, images[held:], validation=images[:held],
                               validate=validate, num_calib=len(images) - held,
                               rounding=rounding)  # fmt: skip
        return mpq.analyze(self.network, images, bits=bits, num_calib=len(images))

    def make(self, row: str) -> Path:
        """The file of a row."""
        if row == "float":
            return self.float_file
        path = self.out / f"{row.replace('/', '-').replace(' ', '-')}.onnx"
        if row in CALIBRATION:
            return runtimes_own(self.float_file, path, self.unlabelled, row)
        widths, _, how = row.partition(" ")
        if widths in WIDTHS:
            policy = mpq.Policy.uniform(*WIDTHS[widths])
        else:
            policy = self.analyze([int(width) for width in widths.split("/")]).policy
        trained = how.endswith("qat")
        found = self._trained(policy, how) if trained else self._quantized(policy, how)
        ends: Any = {"dynamic_axes": self.task.free, "force": True, "allow_float_fallback": True}
        try:
            result = mpq.export(found, path, **ends)
            self.proofs = {"verified": result.verification is not None}
        except ExportError as error:
            print(f"{self.name} {row}: {error}", file=sys.stderr)
            result = mpq.export(found, path, num_test=0, **ends)
            self.proofs = {"verified": False}
        layers = result.certificate.layers
        self.proofs["integer layers"] = f"{sum(x.integer for x in layers)} of {len(layers)}"
        return path

    def _quantized(self, policy: mpq.Policy, how: str) -> mpq.Quantized:
        images, effort = self.unlabelled, "fast" if how == "fast" else "good"
        network = split_signs(self.network) if how == "split" else self.network
        if how.startswith("seed"):
            order = torch.Generator().manual_seed(int(how.removeprefix("seed")))
            images = images[torch.randperm(len(images), generator=order)[: 4 * len(images) // 5]]
        return mpq.ptq(network, images, policy, num_calib=len(images),
                       validation=self.unlabelled[:VERIFIED], effort=effort)  # fmt: skip

    def _trained(self, policy: mpq.Policy, how: str) -> mpq.Quantized:
        """The float network teaches, without a label."""
        network = self.network
        images = self.task.lessons() if self.task.lessons else self.unlabelled
        held = self.task.held() if self.task.held else self.unlabelled[:VERIFIED]
        if how.startswith("split"):
            network = split_signs(network)
            sides = [part for half in images.chunk(2, 2) for part in half.chunk(2, 3)]
            images = torch.cat(sides)
        return mpq.qat(network, images, policy, epochs=self.epochs, settings=SELF_TAUGHT,
                       validation=held)  # fmt: skip

    def row(self, name: str) -> dict[str, Any]:
        """All figures of a row."""
        began = time.process_time()
        if name.startswith("rho"):
            found = self.analyze(validate=20, rounding=name[4:] or "nearest").validation
            return {"task": self.name, "row": name, "rho": round(found.rho, 3), "policies": 20}
        self.proofs: dict[str, Any] = {}
        path = self.make(name)
        made = time.process_time() - began
        answers = answers_of(path, self.inputs)
        figures = self.task.metric(answers) | self.task.agreement(self.reference, answers)
        if self.task.held:
            held = list(self.task.held().split(1))
            far = decibels(answers_of(self.float_file, held), answers_of(path, held))
            figures["held dB"] = far["SQNR dB"]
        times = interleave([self._runner(p) for p in (self.float_file, path)], runs=30)
        return {
            "task": self.name,
            "row": name,
            **{key: round(float(value), 4) for key, value in figures.items()},
            "bytes": file_bytes(path),
            "faster": round(float(np.median(times[0] / times[1])), 2),
            **self.proofs,
            "cpu_s": round(made, 1),
        }

    def _runner(self, path: Path) -> Callable[[], object]:
        loaded = session(path)
        feed = {loaded.get_inputs()[0].name: self.inputs[0].numpy()}
        return lambda: loaded.run(None, feed)


def main() -> None:
    """Measure the rows that are named, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("rows", nargs="*", default=["float", *CALIBRATION, *WIDTHS, "8/4"])
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--epochs", type=int, default=4, help="Of rows with qat.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(chosen.task, chosen.out, chosen.epochs)
    print(json.dumps(setting()), file=sys.stderr)
    with (chosen.out / "rows.jsonl").open("a", encoding="utf-8") as file:
        for name in chosen.rows:
            line = json.dumps(bench.row(name))
            print(line, flush=True)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
