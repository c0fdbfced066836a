"""The metrics that mpq brings: accuracy, mean IoU, PSNR, SSIM, agreement with the float network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.batch import described, targets_of
from mpq.calls import leaves
from mpq.errors import DataError
from mpq.metrics.detections import are_detections, detection_agreement, mean_average_precision
from mpq.metrics.metric import Metric, mean
from mpq.outputs import CHOICES, decisions, divergence, spread_of
from mpq.policy import OutputKind

IGNORED = 255
"""The label of pixels that count for no class, as well as negative ones."""
FLOOR = 1e-10
"""Least mean square of a difference: equal pictures have 100 dB."""
WINDOW, SIGMA = 11, 1.5
"""Of the Gaussian that SSIM looks through."""


def only(outputs: Any, metric: str) -> Tensor:
    """The one output that a metric looks at.

    Raises:
        DataError: there are several, or none.
    """
    found = leaves(outputs)
    if len(found) != 1:
        raise DataError(
            f"the metric {metric} looks at one output. Got {described(outputs)}. Let --postprocess "
            "module:function give that one, take --metric agreement, or a --metric "
            "module:function of your own."
        )
    output: Tensor = next(iter(found.values()))
    return output


def truth(batch: Any, metric: str, form: str, fits: Callable[[Tensor], bool]) -> Tensor:
    """The labels or pictures that came with a batch.

    Raises:
        DataError: there are none, or of another form.
    """
    found = targets_of(batch)
    if found is None:
        raise DataError(
            f"the metric {metric} needs {form}, but the images come without. Give labelled data "
            "(--data, or --batches module:factory), or take --metric agreement, which asks the "
            "float network."
        )
    if not isinstance(found, Tensor) or not fits(found):
        raise DataError(f"the metric {metric} needs {form}. Got {described(found)}.")
    return found


def _hits(outputs: Any, batch: Any, *, count: int) -> list[float]:
    """Whether the label is among the `count` largest logits, 100 or 0."""
    name = f"top{count}"
    logits = only(outputs, name)
    logits = logits.flatten(1) if logits[0].numel() == logits.shape[1] else logits
    form = f"a class id for each of {len(logits)} images"
    labels = truth(batch, name, form, lambda t: t.shape == logits.shape[:1])
    if logits.ndim != 2 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"the metric {name} needs logits [N, classes] for labels up to {int(labels.max())}. "
            f"Got {described(logits)}."
        )
    labels = labels.to(logits.device)
    if count == 1:
        hits = logits.argmax(1) == labels
    else:
        chosen = logits.topk(min(count, logits.shape[1]), dim=1).indices
        hits = (chosen == labels[:, None]).any(1)
    return [100.0 * float(hit) for hit in hits]


def _confusion(outputs: Any, batch: Any) -> list[Tensor]:
    """For each image how many pixels of class i were given class j, `[K, K]`."""
    logits = only(outputs, "miou")
    places = logits.shape[:1] + logits.shape[2:]
    form = f"class ids {list(places)}, as the output has places"
    labels = truth(batch, "miou", form, lambda t: t.shape == places and not t.is_floating_point())
    chosen = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
    classes = max(2, logits.shape[1])
    labels = labels.to(logits.device).long()
    known = (labels >= 0) & (labels != IGNORED)
    if known.any() and int(labels[known].max()) >= classes:
        raise DataError(
            f"the metric miou needs labels below {classes}, the classes of the output, or "
            f"{IGNORED} for none. Got {int(labels[known].max())}."
        )
    return [
        torch.bincount(classes * t[k] + c[k], minlength=classes**2).view(classes, classes).cpu()
        for t, c, k in zip(labels, chosen, known, strict=True)
    ]


def _mean_iou(parts: Sequence[Tensor]) -> float:
    """In percent, the mean over classes that occur in labels or answers."""
    table = torch.stack(list(parts)).sum(0).double()
    both = table.diag()
    union = table.sum(0) + table.sum(1) - both
    return 100 * float((both[union > 0] / union[union > 0]).mean())


def _pictures(outputs: Any, batch: Any, metric: str) -> tuple[Tensor, Tensor]:
    found = only(outputs, metric).float()
    form = f"pictures {list(found.shape)} in 0..1, as the output is"
    wanted = truth(
        batch, metric, form, lambda t: t.shape == found.shape and t.is_floating_point()
    ).to(found)
    return found.clamp(0, 1), wanted


def _psnr(outputs: Any, batch: Any) -> list[float]:
    """`10 log10(1 / mse)` in dB of each picture in 0..1, clamped."""
    found, wanted = _pictures(outputs, batch, "psnr")
    errors = (found - wanted).double().square().flatten(1).mean(1)
    return (-10 * errors.clamp(min=FLOOR).log10()).tolist()


def _ssim(outputs: Any, batch: Any) -> list[float]:
    """Structural similarity of each picture `[C, H, W]` in 0..1, the mean over its windows.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity,
    IEEE Transactions on Image Processing, 2004.
    """
    x, y = _pictures(outputs, batch, "ssim")
    if min(x.shape[2:]) < WINDOW:
        raise DataError(f"the metric ssim needs pictures of {WINDOW} pixels a side or more.")
    line = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line = (line / line.sum()).to(x)
    window = torch.outer(line, line).expand(x.shape[1], 1, -1, -1)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, window, groups=z.shape[1])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return found.double().flatten(1).mean(1).tolist()


def agreement(kinds: Mapping[str, OutputKind], references: Sequence[Any]) -> Metric:
    """How much of the float network's answers is kept, in percent: the mean over its outputs.

    Choices and whole numbers count where they are equal. Of quantities it is the explained
    variance, `100 (1 - mean square of the difference / variance)`: 99 means 20 dB. Of detections it
    is COCO's mean average precision with the float's confident ones for the truth.

    Args:
        kinds: of the outputs.
        references: what the float network answers, batch by batch.
    """
    if references and are_detections(references[0]):
        return detection_agreement()
    named = [leaves(answer) for answer in references]
    spreads = {
        name: spread_of(torch.cat([answer[name].flatten() for answer in named]))
        for name in (named[0] if named else ())
        if kinds.get(name, "regression") == "regression"
    }
    return Metric("agreement", partial(_agree, kinds, spreads), mean, against="float")


def _agree(
    kinds: Mapping[str, OutputKind], spreads: Mapping[str, float], outputs: Any, batch: Any
) -> list[float]:
    reference, found = leaves(targets_of(batch)), leaves(outputs)
    if {n: t.shape for n, t in reference.items()} != {n: t.shape for n, t in found.items()}:
        raise DataError(
            "agreement needs answers of the same form as the float network's, "
            f"{described(targets_of(batch))}. Got {described(outputs)}."
        )
    each = []
    for name, other in found.items():
        kind, wanted = kinds.get(name, "regression"), reference[name].to(other.device)
        if kind == "ignored":
            continue
        if kind == "regression":
            kept = 1 - 2 * divergence(kind, wanted.double(), other.double(), spreads[name])
        else:
            same = decisions(kind, wanted) == decisions(kind, other)
            kept = same.double().reshape(len(same), -1).mean(1)
        each.append(100 * kept.cpu())
    total: list[float] = torch.stack(each).mean(0).tolist()
    return total


def kinds_of(answer: Any) -> dict[str, OutputKind]:
    """The kinds of an answer of which nothing else is known: classes only where it is `[N, K]`."""
    found = leaves(answer)
    if len(found) == 1 and next(iter(found.values())).ndim == CHOICES["classes"] + 1:
        return dict.fromkeys(found, "classes")
    return {n: "regression" if t.is_floating_point() else "exact" for n, t in found.items()}


BUILTIN: dict[str, Metric] = {
    "top1": Metric("top1", partial(_hits, count=1), mean),
    "top5": Metric("top5", partial(_hits, count=5), mean),
    "miou": Metric("miou", _confusion, _mean_iou, places=True),
    "map": mean_average_precision(),
    "psnr": Metric("psnr", _psnr, mean),
    "ssim": Metric("ssim", _ssim, mean),
}
"""Metrics by name; `agreement` is made for a network (`agreement`)."""
NAMES = (*BUILTIN, "agreement")
