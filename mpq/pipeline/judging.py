"""A metric of model files, beside what `bench` measures of them anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.batch import inputs_of, targets_of
from mpq.data import Normalization
from mpq.export import runtime
from mpq.export.bench import BenchRow
from mpq.export.meta import from_metadata
from mpq.metrics.metric import compare
from mpq.pipeline.measuring import (
    Evaluation,
    Held,
    against,
    file_answers,
    judging_of,
    no_images,
    normalizer,
    opened,
)
from mpq.pipeline.wishes import Wishes

Images = tuple[NDArray[Any], NDArray[Any] | None]


def judge_files(
    rows: Sequence[BenchRow],
    wishes: Wishes,
    images: Images | None,
    normalize: Normalization | None,
    *,
    tell: Callable[[str], None],
) -> list[BenchRow]:
    """The rows with the metric that is asked for, and what each loses against the first.

    Args:
        rows: of files, the float one first where there is one.
        wishes: the metric, and batches of the user's own.
        images: test images and class ids, where there are no such batches.
        normalize: of pixels.
        tell: called with what is being measured.

    Raises:
        DataError: there are neither batches nor images.
    """
    paths = [Path(row.file) for row in rows]
    given = opened(wishes)
    judging = judging_of(wishes, None if given is None else given.validation or given.train)
    assert judging is not None, "it is asked for"
    batches, pixels = _batches(judging.batches, images, normalize, judging.metric.name)
    evaluation = against(judging, batches, file_answers(paths[0]), _kinds(paths))
    found = []
    for path in paths:
        tell(f"{judging.metric.name} of {path}")
        found.append(_parts(evaluation, path, pixels))
    metric = evaluation.metric
    return [
        replace(
            row,
            metric=metric.name,
            value=metric.value(parts),
            lost=None if parts is found[0] else asdict(compare(metric, found[0], parts)),
        )
        for row, parts in zip(rows, found, strict=True)
    ]


def _batches(
    given: Iterable[Any] | None, images: Images | None, normalize: Normalization | None, metric: str
) -> tuple[Iterable[Any], Held | None]:
    """Batches as a network takes them, and the same as pixels, for files that take these."""
    if given is not None:
        return given, None
    if images is None:
        raise no_images(metric)
    return Held(*images, normalizer(normalize)), Held(*images, torch.from_numpy)


def _parts(evaluation: Evaluation, path: Path, pixels: Held | None) -> list[Any]:
    """What the metric keeps of a file; one that takes pixels is given them."""
    if not runtime.model_input(runtime.session(path)).integer or pixels is None:
        return evaluation.parts_of_file(path)
    pairs = zip(pixels, evaluation.batches, strict=True)
    raw = [(inputs_of(one), targets_of(other)) for one, other in pairs]
    return replace(evaluation, batches=raw).parts_of_file(path, _as_array)


def _as_array(batch: Any) -> Any:
    pixels: Tensor = batch[0]
    return pixels.numpy()


def _kinds(paths: Sequence[Path]) -> Any:
    """The kinds of outputs, where a file says them; none for a plain classifier."""
    for path in paths:
        policy = from_metadata(runtime.metadata(runtime.session(path)), str(path))
        if policy is not None and policy.outputs:
            return policy.outputs
    return None
