"""Kinds of answers: how two of them are compared, what a change of one costs, and which is which.

A network answers with tensors by name (`mpq.calls.leaves`), and each has a kind:

    classes      [N, K], [N, K, 1, 1]     logits, one choice for an image
    places       [N, K, ...]              logits, one choice for each pixel, voxel or moment
    sequence     [N, ..., K]              logits, one choice for each step
    regression   any floats               quantities: boxes, embeddings, pictures, raw maps
    exact        whole numbers, truth values
    ignored      nobody reads it

Three questions are answered here for all of them and nowhere else. `compare`: how far apart two
answers are. `divergence`: what a change costs, which a student is taught by and one candidate at a
time is measured by. `direction`: a random vector `v` whose `1/2 (v dz)^2` is, for small changes
`dz`, that same divergence in expectation, so that one backward pass scores by it. Costs are means
over the places of an output, and quantities count in units of their spread: a choice that is lost
costs about a nat and so does a quantity that is, whatever the sizes, and outputs can be added up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq.errors import UsageError, nearest
from mpq.numerics import decibels, kl_divergence, powers
from mpq.policy import OUTPUT_KINDS, OutputKind

CHOICES: Mapping[str, int] = {"classes": 1, "places": 1, "sequence": -1}
"""The kinds that choose among classes, with the dimension of these."""


def _words(text: str) -> frozenset[str]:
    """The words of names: `bboxHead.cls_logits` has bbox, head, cls and logits."""
    return frozenset(w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text))


QUANTITIES = _words(
    "box boxes bbox bboxes reg regression regressor loc location locations coord coords offset "
    "offsets delta deltas anchor anchors landmark landmarks ldm keypoint keypoints kpt kpts pose "
    "depth disparity flow normals embedding embeddings embed descriptor centerness objectness iou "
    "angle"
)
"""Words in the name of an output, or of the layer that makes it, which say that it is no choice."""
FEATURES = _words("feature features feat feats hidden state states pooler image images size sizes")
"""Likewise, in the name of an output only: a classifier may end in a layer `features.12`."""
NAMED_CHOICES = _words(
    "logit logits class classes cls classifier classification seg segmentation semantic labels aux "
    "category ctc"
)
"""Words which say that an output chooses among classes."""
BOUNDED = frozenset(("sigmoid", "hardsigmoid", "tanh", "normalize", "norm", "vectornorm"))
"""Operations after which each value stands for itself, or all of them for a direction. Of an
operation names are without underscores."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of an output before its kind is.

    Args:
        shape: of the answer to one image, the batch first.
        floating: whether it holds floats.
        layers: paths of the layers that it comes from.
        convolved: whether one of them is a convolution.
        operations: names of the operations between them and the output, without underscores.
        softmax: the dimension of a softmax among these.
        quantized: whether its values depend on a layer, so that quantization moves them.
    """

    shape: tuple[int, ...]
    floating: bool = True
    layers: tuple[str, ...] = ()
    convolved: bool = False
    operations: frozenset[str] = frozenset()
    softmax: int | None = None
    quantized: bool = True


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a network: its kind, and by which rule."""

    name: str
    kind: OutputKind
    rule: str
    evidence: Evidence


def propose(name: str, seen: Evidence, *, alone: bool) -> Output:
    """The kind of an output; `regression`, which holds for any floats, where nothing else is clear.

    Args:
        name: of the output.
        seen: what is known of it.
        alone: whether it is the network's only answer.
    """
    kind, rule = _propose(name, seen, alone)
    return Output(name, kind, rule, seen)


def _propose(name: str, seen: Evidence, alone: bool) -> tuple[OutputKind, str]:
    own, made_by = _words(name), _words(" ".join(seen.layers))
    if not seen.floating:
        return "exact", "it holds whole numbers or truth values"
    if found := own & (QUANTITIES | FEATURES) or made_by & QUANTITIES:
        return "regression", f"{min(found)!r} in its name, or its layer's, is a quantity"
    if seen.softmax is not None:
        kind = _choice(seen, seen.softmax % len(seen.shape) == len(seen.shape) - 1)
        return (kind, "it ends in a softmax") if kind else ("regression", "there is no choice")
    if found := seen.operations & BOUNDED:
        return "regression", f"it ends in {min(found)}"
    last = not seen.convolved or bool(seen.operations & {"permute", "transpose"})
    kind = _choice(seen, last)
    if alone and kind == "classes":
        return kind, "it is the only answer and gives [N, K]"
    if kind and (found := (own | made_by) & NAMED_CHOICES):
        return kind, f"{min(found)!r} in its name, or its layer's, is a choice"
    return "regression", "nothing says that it is a choice among classes"


def _choice(seen: Evidence, last: bool) -> OutputKind | None:
    """The kind of a choice that has this shape, its classes in the last dimension or the second."""
    shape = seen.shape
    if len(shape) > 1 and math.prod(shape[2:]) == 1:
        return "classes" if shape[1] > 1 else None
    if len(shape) < 3 or shape[-1 if last else 1] < 2:
        return None
    return "sequence" if last else "places"


def settle(outputs: Mapping[str, Output], given: Mapping[str, str]) -> dict[str, Output]:
    """Outputs with the kinds that a person gave to some of them.

    Args:
        outputs: as proposed.
        given: kinds by name of output.

    Raises:
        UsageError: no such output, no such kind, or a kind that does not fit the output's shape.
    """
    found = dict(outputs)
    for name, kind in given.items():
        if name not in outputs:
            raise UsageError(
                f"the network answers with {', '.join(outputs)}. Got output {name!r}"
                f"{nearest(name, outputs)}"
            )
        known = next((k for k in OUTPUT_KINDS if k == kind), None)
        if known is None:
            raise UsageError(
                f"the kind of output {name} must be one of {', '.join(OUTPUT_KINDS)}. "
                f"Got {kind!r}{nearest(kind, OUTPUT_KINDS)}"
            )
        _check_shape(name, known, outputs[name].evidence)
        found[name] = replace(outputs[name], kind=known, rule="given")
    return found


def _check_shape(name: str, kind: OutputKind, seen: Evidence) -> None:
    if kind not in CHOICES:
        return
    fits = _choice(seen, kind == "sequence")
    if not seen.floating or kind != fits:
        form = {"classes": "[N, K] or [N, K, 1, 1]", "places": "[N, K, ...]"}
        type_ = "floats" if seen.floating else "whole numbers"
        raise UsageError(
            f"output {name} cannot be of kind {kind}: that needs logits "
            f"{form.get(kind, '[N, ..., K]')} of 2 classes or more. Got {type_} "
            f"{['N', *seen.shape[1:]]}. Try --output {name}="
            f"{(fits or 'regression') if seen.floating else 'exact'}."
        )


# -- comparing ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far apart two answers are.

    Args:
        n: choices that were compared, or values where there is no choice.
        agreement: share of equal choices, or of equal values of an exact output; None for others.
        sqnr_db: power of the first over that of the difference, in dB; None for an exact output.
        largest: largest difference of two values; 0 for an exact output.
    """

    n: int
    agreement: float | None
    sqnr_db: float | None
    largest: float = 0.0


TIE = 2
"""Steps between two classes that rounding may exchange: one may gain a step, the other lose one."""


class Tally:
    """Compares answers that come batch by batch, and holds few of them at a time.

    Args:
        kind: of the output.
        step: to which the values of a choice are rounded; a class that the first answer holds
            within `TIE` steps of its best is then as right as that. 0: only equal choices are.
    """

    HELD = 2**25
    """Values that are held before they are compared, at most, the last batch aside."""

    def __init__(self, kind: OutputKind, step: float = 0.0) -> None:
        self.kind, self.step = kind, step
        self._held: list[tuple[Tensor, Tensor]] = []
        self._n, self._equal, self._signal, self._noise, self._largest = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, want: Tensor, have: Tensor) -> None:
        """Add what two networks answer to the same images; both of one shape."""
        self._held.append((want, have))
        if sum(want.numel() for want, _ in self._held) > self.HELD:
            self._look()

    def result(self) -> Comparison:
        """All that was added, compared."""
        self._look()
        choice, exact = self.kind in CHOICES, self.kind == "exact"
        share = self._equal / self._n if self._n else float("nan")
        return Comparison(
            self._n,
            share if choice or exact else None,
            None if exact else decibels(self._signal, self._noise),
            self._largest,
        )

    def _look(self) -> None:
        if not self._held:
            return
        want, have = (torch.cat([x.reshape(x.shape or (1,)) for x in side])
                      for side in zip(*self._held, strict=True))  # fmt: skip
        self._held = []
        if self.kind == "exact" or self.kind in CHOICES:
            one, two = decisions(self.kind, want), decisions(self.kind, have)
            same_choice = one == two
            if self.step and self.kind in CHOICES:
                same_choice |= shortfall(self.kind, want, two) <= TIE * self.step
            self._n += one.numel()
            self._equal += float(same_choice.double().sum())
        else:
            self._n += want.numel()
        if self.kind != "exact" and want.numel():
            same = want == have  # infinities that agree are neither noise nor signal
            apart = torch.where(same, 0.0, want.double() - have.double())
            signal, noise = powers(want.masked_fill(want.isinf() & same, 0.0), apart)
            self._signal, self._noise = self._signal + signal, self._noise + noise
            self._largest = max(self._largest, float(apart.abs().max()))


def compare(kind: OutputKind, want: Tensor, have: Tensor) -> Comparison:
    """How far `have` is from `want`, both of one shape."""
    tally = Tally(kind)
    tally.add(want, have)
    return tally.result()


def decisions(kind: OutputKind, answer: Tensor) -> Tensor:
    """What an answer chooses: classes by number; an exact answer is what it is."""
    if kind not in CHOICES:
        return answer
    return (answer.flatten(1) if kind == "classes" else answer).argmax(CHOICES[kind])


def shortfall(kind: OutputKind, answer: Tensor, chosen: Tensor) -> Tensor:
    """By how much the logit of each chosen class is below the best one; shaped like `chosen`."""
    logits = _last(kind, answer)
    return logits.amax(-1) - logits.gather(-1, chosen[..., None]).squeeze(-1)


# -- what a change costs -----------------------------------------------------------------------


def divergence(kind: OutputKind, reference: Tensor, other: Tensor, spread: float = 1.0) -> Tensor:
    """What it costs that `other` is answered, for each image `[N]`; never below 0.

    Choices: `KL(softmax(reference) || softmax(other))` in nats, the mean over places or steps.
    Regression: `1/2 ((other - reference) / spread)^2`, the mean over values: the divergence of two
    Gaussians whose deviation is that of the answer itself. Exact: the share of values that differ.

    Args:
        kind: of the output.
        reference: the answers of the network that is right: float, or a teacher.
        other: answers to the same images.
        spread: of the output (`spread_of`), for regression.
    """
    if kind == "ignored":
        return torch.zeros(len(reference), dtype=torch.float64)
    if kind in CHOICES:
        cost = kl_divergence(*(_last(kind, z).log_softmax(-1) for z in (reference, other)))
    elif kind == "exact":
        cost = (reference != other).double()
    else:
        cost = ((other - reference) / spread).square() / 2
    return cost.reshape(len(cost), -1).mean(1)


def direction(
    kind: OutputKind,
    answer: Tensor,
    signs: Tensor,
    *,
    spread: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """`v`, like the answer in shape, with `E (v dz)^2 / 2` the divergence of a small change `dz`.

    Choices: `v = sqrt(p) e - p (sqrt(p)' e)` with random signs `e` has covariance `diag(p) - p p'`,
    the Fisher information of the softmax, exactly, without the variance of a sampled label.
    Regression: `v = e / spread`. Both over the root of the number of places or values of an image.

    Args:
        kind: a choice or regression; no gradient reaches what is exact or ignored.
        answer: detached.
        signs: random, -1 and 1, like the answer in shape.
        spread: as for `divergence`.
        temperature: >= 1, softens the predicted probabilities of choices.
    """
    if kind not in CHOICES:
        return signs / (spread * math.sqrt(answer.numel() / len(answer)))
    p = (_last(kind, answer).float() / temperature).softmax(-1)
    root = p.sqrt() * _last(kind, signs)
    v = root - p * root.sum(-1, keepdim=True)
    v = v / math.sqrt(v.numel() / v.shape[-1] / len(v))
    return v.reshape(answer.shape) if kind == "classes" else v.movedim(-1, CHOICES[kind])


def spread_of(answer: Tensor) -> float:
    """The deviation of an output's values from their mean; their size where all are equal."""
    values = answer.double()
    found = float(values.std(correction=0)) or float(values.square().mean().sqrt())
    return found or 1.0


def _last(kind: OutputKind, z: Tensor) -> Tensor:
    """The dimension of the classes at the end."""
    return z.flatten(1) if kind == "classes" else z.movedim(CHOICES[kind], -1)
