"""How the answers of networks and of files are judged: by a metric, on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.batch import described, each, inputs_of, moved
from mpq.calls import Inputs, call, formed, leaves
from mpq.data import Normalization
from mpq.data.dataset import Samples, length, rows
from mpq.errors import DataError, UsageError
from mpq.metrics.builtin import agreement, kinds_of
from mpq.metrics.given import Decode, decoded_by, metric_of
from mpq.metrics.metric import Loss, Metric, compare
from mpq.pipeline.wishes import Wishes
from mpq.policy import OutputKind
from mpq.train.evaluate import CACHED_PIXELS, evaluating
from mpq.userimport import import_callable, made_by

BATCH = 32
"""Images at a time, at most."""


def no_images(metric: str) -> DataError:
    """There is nothing to measure on."""
    return DataError(
        f"the metric {metric} needs images to measure on. Name data with --data, or batches "
        "with --batches module:factory."
    )


@dataclass(frozen=True)
class Batches:
    """What `--batches` names: batches as a training loop has them, read anew for each epoch.

    Args:
        train: to learn from and to score on.
        validation: to measure on; None: where there are other data for that.
    """

    train: Iterable[Any]
    validation: Iterable[Any] | None = None


@dataclass(frozen=True)
class Judging:
    """How a person wants answers to be judged.

    Args:
        metric: built in, or the user's.
        batches: to measure on. None: the held-out images of the data and their class ids.
        decode: what is applied to the outputs before the metric sees them.
    """

    metric: Metric
    batches: Iterable[Any] | None = None
    decode: Decode | None = None


def opened(wishes: Wishes) -> Batches | None:
    """The batches, if there are any."""
    if isinstance(wishes.batches, str):
        return batches_of(wishes.batches)
    return None if wishes.batches is None else Batches(wishes.batches)


def judging_of(wishes: Wishes, batches: Iterable[Any] | None) -> Judging | None:
    """The metric, if one is asked for, and what it is measured on.

    Raises:
        UsageError: it is none, or something is asked of it that is not there.
    """
    if wishes.metric is None:
        if wishes.lower or wishes.postprocess is not None:
            raise UsageError("--lower-is-better and --postprocess go with --metric. Name one.")
        return None
    decode = wishes.postprocess
    if isinstance(decode, str):
        decode = import_callable(decode, "--postprocess", UsageError)
    return Judging(metric_of(wishes.metric, lower=wishes.lower), batches, decode)


def batches_of(name: str) -> Batches:
    """Call the factory of batches.

    Raises:
        DataError: it fails, or gives something else.
    """
    made = made_by(name, "--batches", DataError)
    parts = made if isinstance(made, Mapping) else {"train": made, "validation": made}
    extra = set(parts) - {"train", "validation"}
    again = all(isinstance(p, Iterable) and not isinstance(p, Iterator) for p in parts.values())
    if extra or "train" not in parts or not again or isinstance(made, Tensor):
        raise DataError(
            f"batches {name} must be a DataLoader or a list of batches, or a dict of these by "
            f"train and validation, which can be gone through again. Got {described(made)}."
        )
    return Batches(parts["train"], parts.get("validation"))


@dataclass(frozen=True)
class Held:
    """Held-out images and class ids as batches; tuples of an input and, where known, labels."""

    images: Samples
    labels: NDArray[np.int64] | None
    prepare: Callable[[Samples], Inputs]

    def __iter__(self) -> Iterator[Any]:
        images = not isinstance(self.images, Mapping)
        pixels = self.images.shape[1] * self.images.shape[2] if images else 1
        step = max(1, min(BATCH, CACHED_PIXELS // pixels))
        for at in range(0, length(self.images), step):
            inputs = self.prepare(rows(self.images, slice(at, at + step)))
            if self.labels is None:
                yield (inputs,)
            else:
                yield inputs, torch.from_numpy(self.labels[at : at + step])


@dataclass(frozen=True)
class Evaluation:
    """A metric with all that it is measured on.

    Args:
        metric: of which `agreement` is complete.
        batches: gone through anew for each network.
        decode: as of `Judging`.
    """

    metric: Metric
    batches: Iterable[Any]
    decode: Decode | None = field(default=None)

    def parts(self, module: nn.Module) -> list[Any]:
        """What the metric keeps of a network's answers.

        Raises:
            DataError, UsageError: a batch or answers that the metric cannot take.
        """
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with evaluating(module):
            return self.parts_of(lambda inputs: call(module, inputs), device)

    def parts_of(
        self,
        answer: Callable[[Any], Any],
        device: torch.device | str = "cpu",
        feed: Callable[[Any], Any] = inputs_of,
    ) -> list[Any]:
        """The same of any function of what it is fed with of a batch that is there."""
        found: list[Any] = []
        for batch in each(self.batches):
            there = moved(batch, device)
            found += self.metric.keep(decoded_by(self.decode, answer(feed(there))), there)
        if not found:
            raise UsageError(
                f"the metric {self.metric.name} needs at least one batch. Got none: an iterator "
                "can be read only once, so give a DataLoader or a list."
            )
        return found

    def value(self, module: nn.Module) -> float:
        """The metric of a network."""
        return self.metric.value(self.parts(module))

    def lost(self, before: list[Any], after: list[Any]) -> Loss:
        """What is lost between two networks, with its interval."""
        return compare(self.metric, before, after)

    def parts_of_file(self, path: Path, feed: Callable[[Any], Any] = inputs_of) -> list[Any]:
        """What the metric keeps of a file's answers in onnxruntime.

        Args:
            path: an ONNX file.
            feed: what it takes of a batch.
        """
        return self.parts_of(file_answers(path), feed=feed)


def file_answers(path: Path) -> Callable[[Any], Any]:
    """A file as a function of inputs, as its network is one."""
    from mpq.export import runtime  # the file's side of the package

    loaded = runtime.session(path)

    def answer(inputs: Any) -> Any:
        arrays = [x.numpy() if isinstance(x, Tensor) else x for x in _flat(inputs)]
        found = runtime.answers(loaded, arrays[0] if len(arrays) == 1 else arrays)
        return formed({name: torch.from_numpy(x) for name, x in found.items()})

    return answer


def _flat(inputs: Any) -> list[Any]:
    return [inputs] if isinstance(inputs, np.ndarray) else list(leaves(inputs).values())


def against(
    judging: Judging,
    batches: Iterable[Any],
    answer: Callable[[Any], Any],
    kinds: Mapping[str, OutputKind] | None = None,
) -> Evaluation:
    """An evaluation, for which the float network is run where the metric compares with it.

    Args:
        judging: what is asked for.
        batches: to measure on.
        answer: of the float network, to inputs.
        kinds: of its outputs; None: as its answers say.
    """
    if judging.metric.against == "batch":
        return Evaluation(judging.metric, batches, judging.decode)
    pairs = []
    for batch in each(batches):
        inputs = inputs_of(batch)
        pairs.append((inputs, decoded_by(judging.decode, moved(answer(inputs), "cpu"))))
    references = [reference for _, reference in pairs]
    if kinds is None or (judging.decode is not None and references):
        kinds = kinds_of(references[0]) if references else {}
    metric = agreement(kinds, references)
    return Evaluation(replace(metric, higher=judging.metric.higher), pairs, judging.decode)


def normalizer(normalize: Normalization | None) -> Callable[[NDArray[Any]], Tensor]:
    """Pixels `[n, H, W, 3]` as a network takes them, and floats as they are."""

    def prepare(images: NDArray[Any]) -> Tensor:
        if images.dtype != np.uint8:
            return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        if normalize is None:
            raise UsageError("how images are normalized must be known. Name it with --normalize.")
        return torch.from_numpy(normalize.apply(images))

    return prepare
