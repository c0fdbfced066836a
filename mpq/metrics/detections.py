"""COCO's mean average precision of detections, as torchmetrics and pycocotools compute it.

Detections are a list with a dict for each image: `boxes [M, 4]` as x1, y1, x2, y2, `scores [M]` and
`labels [M]`; the truth has boxes and labels. Networks whose maps are decoded outside of them need
`--postprocess module:function`, which is given the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpq._torchvision import declare_missing
from mpq.batch import described, targets_of
from mpq.errors import DataError, UsageError
from mpq.metrics.metric import Metric

CONFIDENT = 0.3
"""Score of the float network's detections that others are to find."""
DRAWS = 20
"""It takes a second for a hundred images."""
Found = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Detections of an image, and the truth."""


def mean_average_precision() -> Metric:
    """MAP at IoU 0.5 to 0.95 in percent."""

    def keep(outputs: Any, batch: Any) -> list[Found]:
        targets = targets_of(batch)
        if targets is None:
            raise DataError(
                "the metric map needs boxes and labels, but the images come without. Give them "
                "with --batches module:factory, or take --metric agreement, which asks the float "
                "network."
            )
        return _pairs(outputs, targets)

    return Metric("map", keep, _coco, draws=DRAWS)


def detection_agreement() -> Metric:
    """MAP in percent with the float network's detections of score over 0.3 for the truth."""

    def keep(outputs: Any, batch: Any) -> list[Found]:
        sure = [_where(one, one["scores"] > CONFIDENT) for one in _listed(targets_of(batch), True)]
        return _pairs(outputs, sure)

    return Metric("agreement", keep, _coco, against="float", draws=DRAWS)


def are_detections(outputs: Any) -> bool:
    """Whether an answer is a list of detections."""
    return (
        isinstance(outputs, list | tuple)
        and len(outputs) > 0
        and all(isinstance(one, Mapping) and {"boxes", "scores"} <= set(one) for one in outputs)
    )


def _pairs(outputs: Any, targets: Any) -> list[Found]:
    found, wanted = _listed(outputs, True), _listed(targets, False)
    if len(found) != len(wanted):
        raise DataError(f"detections must come for each of {len(wanted)} images. Got {len(found)}.")
    return list(zip(found, wanted, strict=True))


def _listed(value: Any, scored: bool) -> list[dict[str, Tensor]]:
    keys = ("boxes", "scores", "labels") if scored else ("boxes", "labels")
    right = isinstance(value, list | tuple) and all(
        isinstance(one, Mapping) and set(keys) <= set(one) for one in value
    )
    if not right:
        raise DataError(
            f"the metric map needs a list with a dict of {', '.join(keys)} for each image. Got "
            f"{described(value)}. Maps are decoded by --postprocess module:function."
        )
    return [{key: torch.as_tensor(one[key]).detach().cpu() for key in keys} for one in value]


def _where(one: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {key: values[rows] for key, values in one.items()}


def _coco(parts: Sequence[Found]) -> float:
    declare_missing()  # torchmetrics imports torchvision where there is one
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(box_format="xyxy")
    except ImportError as error:
        raise UsageError(
            f"the metric map needs torchmetrics and pycocotools ({error}). Install them with "
            "pip install 'mpq-compiler[metrics]'."
        ) from None
    metric.warn_on_many_detections = False
    found, wanted = zip(*parts, strict=True)
    metric.update(list(found), list(wanted))
    return 100 * float(metric.compute()["map"])
