"""Detection, segmentation, super-resolution, keywords: real weights, float against quantized.

For each network of `../shared/data/tasks` a row for the float file, for onnxruntime's own static
int8 (min-max and percentile) and for mpq at several widths, all calibrated on the same unlabelled
inputs: the task's own metric, agreement with the float network, bytes, and how many times faster.

A row is `float`, `minmax` or `percentile` (onnxruntime's), or widths: `w8a8`, `w4a8`, `8/4` (4.8
bits as analyzed), with ` fast` behind them for `--effort fast` and with ` qat` for training where
the float network teaches. `rho` is the rank correlation of scores against measured divergence.

    MPQ_DATA=... python benchmarks/tasks.py detect w8a8 "8/4 qat" rho --epochs 4 --out runs/tasks
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from common import setting
from numpy.typing import NDArray
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn

import mpq
from mpq.export.bench import file_bytes, interleave
from mpq.export.onnx_file import float_to_onnx
from mpq.graph.passes import to_float
from mpq.targets import this_target

DATA = Path(os.environ.get("MPQ_DATA", "../shared/data"))
Answers = list[list[NDArray[np.float32]]]
"""For each input the outputs of the network."""
CONFIDENT = 0.3
"""Score of the float detector's boxes that count as truth in its agreement."""
CALIBRATION = {"minmax": "MinMax", "percentile": "Percentile"}
WIDTHS = {"w8a8": (8, 8), "w4a8": (4, 8)}
SELF_TAUGHT = {
    "optimizer": "adamw",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "batch": 8,
    "temperature": 1.0,
    "crop": 0.0,
    "norm": "folded",
}
"""What differs from the recipe `qat`: few pictures, and losses that begin near zero."""


@dataclass(frozen=True)
class Task:
    """A network with inputs, and how its answers are judged.

    Args:
        network: with its weights.
        unlabelled: inputs to calibrate on and to learn from, `[n, C, H, W]`.
        inputs: what it is measured on, one at a time.
        metric: figures of answers to `inputs`, by name.
        agreement: the same with the float network's answers for the truth.
        free: sizes that differ among `inputs`, by the names of `mpq export --dynamic`.
    """

    network: Callable[[], nn.Module]
    unlabelled: Callable[[], Tensor]
    inputs: Callable[[], list[Tensor]]
    metric: Callable[[Answers], dict[str, float]]
    agreement: Callable[[Answers, Answers], dict[str, float]]
    free: tuple[str, ...] = ("batch",)


# -- the tasks -------------------------------------------------------------------------------------


@cache
def module(task: str) -> Any:
    """The `eval.py` of a task."""
    path = DATA / "tasks" / task / "eval.py"
    spec = importlib.util.spec_from_file_location(f"eval_{task}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@cache
def pictures(count: int = 100) -> list[Image.Image]:
    """ImageNet pictures of those that are to calibrate and choose on."""
    names = (DATA / "imagenet-sample-choose.txt").read_text().split()[:count]
    with zipfile.ZipFile(DATA / "imagenet-sample.zip") as archive:
        inside = {n.split("/")[-2]: n for n in archive.namelist() if n.endswith(".webp")}
        return [Image.open(io.BytesIO(archive.read(inside[n]))).convert("RGB") for n in names]


def planes(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """`[n, C, H, W]` in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def detector() -> Task:
    """Yolo-FastestV2 on 128 pictures of COCO."""
    own = module("detect")
    name = "yolo_fastestv2"

    def unlabelled() -> Tensor:
        x = planes([np.asarray(p) for p in pictures()]).flip(1) * 255
        return F.interpolate(x, (own.SIZE, own.SIZE), mode="bilinear").round() / 255

    def boxes(answers: Answers) -> list[NDArray[np.float64]]:
        return [own.decode(name, a, 0) for a in answers]

    def metric(answers: Answers) -> dict[str, float]:
        table = own.ap_table(boxes(answers), own.labels(), own.LIMITS)
        values = np.array(list(table.values()))
        return {"mAP50": values[:, 0].mean(), "mAP": values.mean()}

    def agreement(reference: Answers, answers: Answers) -> dict[str, float]:
        truth = [b[b[:, 4] > CONFIDENT] for b in boxes(reference)]
        truth = [np.concatenate([b[:, 5:], b[:, :4]], 1) for b in truth]
        values = np.array(list(own.ap_table(boxes(answers), truth, own.LIMITS).values()))
        return {"AP50": values[:, 0].mean(), "AP": values.mean()}

    return Task(
        partial(own.load, name), unlabelled, lambda: list(own.inputs().split(1)), metric, agreement
    )


def decibels(reference: Answers, answers: Answers) -> dict[str, float]:
    """Power of all of the float network's answers over that of the difference."""
    pairs = [(a, b) for one, two in zip(reference, answers, strict=True)
             for a, b in zip(one, two, strict=True)]  # fmt: skip
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a, _ in pairs)
    noise = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
    return {"SQNR dB": 10 * float(np.log10(signal / noise)) if noise else float("inf")}


def segmenter() -> Task:
    """W-Net on the 20 test pictures of DRIVE; 5 of them, without their labels, calibrate."""
    own = module("drive")

    def metric(answers: Answers) -> dict[str, float]:
        return dict(zip(("AUC", "Dice"), own.metric([a[0][0] for a in answers]), strict=True))

    def agreement(reference: Answers, answers: Answers) -> dict[str, float]:
        pairs = [(a[0] > 0, b[0] > 0) for a, b in zip(reference, answers, strict=True)]
        both = sum((a & b).sum() for a, b in pairs)
        dice = 2 * both / sum(a.sum() + b.sum() for a, b in pairs)
        return {"Dice to float": float(dice)} | decibels(reference, answers)

    return Task(
        own.load, lambda: own.inputs()[::4], lambda: list(own.inputs().split(1)), metric, agreement
    )


def enlarger(name: str) -> Task:
    """A super-resolution network on Set5; halved ImageNet pictures calibrate."""
    own = module("sr")

    def unlabelled() -> Tensor:
        low = [np.asarray(p.resize((112, 112), Image.Resampling.BICUBIC)) for p in pictures()]
        if name.startswith("fsrcnn"):
            low = [own.ycc(own.blur(p, 0.3)) for p in low]
        return planes(low)

    return Task(
        partial(own.load, name),
        unlabelled,
        lambda: list(own.inputs(name)),
        lambda answers: {"PSNR dB": own.metric(name, [a[0] for a in answers])},
        decibels,
        ("batch", "height", "width"),
    )


def keywords() -> Task:
    """res8-narrow on 300 clips of Speech Commands; every third, without its label, calibrates."""
    own = module("kws")

    def metric(answers: Answers) -> dict[str, float]:
        found = own.metric(np.concatenate([a[0] for a in answers]))
        return dict(zip(("top1", "top1 of keywords"), (100 * f for f in found), strict=True))

    def agreement(reference: Answers, answers: Answers) -> dict[str, float]:
        pairs = zip(reference, answers, strict=True)
        return {"same %": 100 * float(np.mean([a[0].argmax() == b[0].argmax() for a, b in pairs]))}

    return Task(
        own.load, lambda: own.inputs()[::3], lambda: list(own.inputs().split(1)), metric, agreement
    )


TASKS: dict[str, Callable[[], Task]] = {
    "detect": detector,
    "drive": segmenter,
    "imdn_rtc": partial(enlarger, "imdn_rtc"),
    "fsrcnn_x2": partial(enlarger, "fsrcnn_x2"),
    "kws": keywords,
}


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

    def analyze(self, validate: int = 0) -> Any:
        """The scores, and the policy of 4.8 bits."""
        images, held = self.unlabelled, len(self.unlabelled) // 4
        if validate:
            return mpq.analyze(self.network, images[held:], validation=images[:held],
                               validate=validate, num_calib=len(images) - held)  # fmt: skip
        return mpq.analyze(self.network, images, num_calib=len(images))

    def make(self, row: str) -> Path:
        """The file of a row."""
        if row == "float":
            return self.float_file
        path = self.out / f"{row.replace('/', '-').replace(' ', '-')}.onnx"
        if row in CALIBRATION:
            return runtimes_own(self.float_file, path, self.unlabelled, row)
        widths, _, how = row.partition(" ")
        policy = mpq.Policy.uniform(*WIDTHS[widths]) if widths in WIDTHS else self.analyze().policy
        found = self._trained(policy) if how == "qat" else self._quantized(policy, how)
        mpq.export(found, path, num_test=0, dynamic=self.task.free, force=True,
                   allow_float_fallback=True)  # fmt: skip
        return path

    def _quantized(self, policy: mpq.Policy, how: str) -> mpq.Quantized:
        effort: Any = how or "good"
        return mpq.ptq(self.network, self.unlabelled, policy, num_calib=len(self.unlabelled),
                       validation=self.unlabelled[:1], effort=effort)  # fmt: skip

    def _trained(self, policy: mpq.Policy) -> mpq.Quantized:
        """The float network teaches, on the inputs that calibrate and nothing else."""
        return mpq.qat(self.network, self.unlabelled, policy, epochs=self.epochs,
                       settings=SELF_TAUGHT, validation=self.unlabelled[:1])  # fmt: skip

    def row(self, name: str) -> dict[str, Any]:
        """All figures of a row."""
        began = time.process_time()
        if name == "rho":
            found = self.analyze(validate=20).validation
            return {"task": self.name, "row": name, "rho": round(found.rho, 3), "policies": 20}
        path = self.make(name)
        made = time.process_time() - began
        answers = answers_of(path, self.inputs)
        figures = self.task.metric(answers) | self.task.agreement(self.reference, answers)
        times = interleave([self._runner(p) for p in (self.float_file, path)], runs=30)
        return {
            "task": self.name,
            "row": name,
            **{key: round(float(value), 4) for key, value in figures.items()},
            "bytes": file_bytes(path),
            "faster": round(float(np.median(times[0] / times[1])), 2),
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
