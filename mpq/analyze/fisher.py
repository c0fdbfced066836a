"""The default score: Fisher quadratic forms per layer, from one forward and one backward pass.

The KL divergence between the network's answers before and after a small change of its parameters is
`1/2 dz' F dz` with `dz` the change of the logits and `F = diag(p) - p p'` the Fisher information of
the softmax (S. Amari, "Natural Gradient Works Efficiently in Learning", 1998). For a random `v` of
covariance `F`, `E (v' dz)^2 = dz' F dz`, and to first order `v' dz = sum(g dY)`: `g` the gradient
of `v' z` at a layer's output and `dY = conv(x, Q_b(W) - W)`, or at a tensor with `dY = Q_b(x) - x`.
Every kind of output has such a `v` (`mpq.outputs.direction`); those of several are added up.
So a single backward pass gives, for image i and every layer l and width b at once,

    u_i(l, b) = sum(g dY)        block form (the score)     1/2 mean_i u_i^2
    e_i(l, b) = sum((g dY)^2)    diagonal form              1/2 mean_i e_i

The diagonal form is what ModelOpt calls its gradient score, and in spirit FIT (B. Zandonati et al.,
2022); the block form keeps the correlations within a layer, which ranks configurations better on
every network tried (benchmarks/sensitivity.py). Interactions between layers (CLADO: Z. Deng et al.,
2023), which `U'U / 2N` holds as well, did not rank them better (docs/analysis.md).

Training images are predicted with too much confidence, so `p` is the
softmax at temperature 2: it ranks far better than 1 where the network knows its training images by
heart and hardly worse elsewhere, and its sums are within a factor of 2 of true divergences.

With a loss of the user's own, `g` is the gradient of that loss. What it costs is then taken to the
second order by the empirical Fisher matrix, which is the Hessian where the loss is a negative log
likelihood and the answers are those of its labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq.analyze.batches import Batch, Batches, Rows
from mpq.analyze.judge import Judge
from mpq.analyze.perturb import Column, Perturbations
from mpq.analyze.watch import Watch, reaching, require_finite
from mpq.calls import Inputs
from mpq.errors import UsageError
from mpq.hooks import hooked
from mpq.quant.operation import LayerOp

TEMPERATURE = 2.0
STRIDE = 1_000_003
"""Between the seeds of two batches."""


@dataclass(frozen=True, slots=True)
class FisherTerms:
    """Both forms before the mean over images, float64 `[N, candidates]` on the CPU.

    A candidate without noise has zeros.
    """

    block: Tensor
    diagonal: Tensor

    def scores(self) -> tuple[Tensor, Tensor]:
        """Predicted divergence of each candidate in nats, block and diagonal form."""
        return self.block.square().mean(0) / 2, self.diagonal.mean(0) / 2


def fisher_terms(
    candidates: Perturbations,
    columns: Sequence[Column],
    batches: Batches,
    *,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    loss: Callable[[Any, Any], Tensor] | None = None,
    squares: bool = True,
) -> FisherTerms:
    """`u` and `e` of every image and candidate.

    Args:
        candidates: what quantization would do to each tensor.
        columns: candidates to score.
        batches: the images.
        seed: of the random signs.
        temperature: >= 1, softens the predicted probabilities.
        loss: of answer and batch (`Batches.labels`), a mean over images; None: the divergence from
            the network's own answers.
        squares: off, `e` is left out, and zero: it costs a pass over each tensor and candidate.

    Raises:
        UsageError: the loss is not finite, or no gradient comes from it.
        GraphError: no gradient reaches an output of the network.
        DataError: NaN or infinity, with the layer where it begins.
    """
    recorder = _Recorder(candidates, columns, squares)
    judge = Judge.of(candidates.graph, batches.images, batches.size)

    def measure(part: Batch) -> Rows:
        answer = recorder.run(part.images, part.count)
        answers = judge.answers(answer)
        require_finite(answers, candidates.graph, part.images)
        if loss is not None:
            (part.count * gradient_of(loss, answer, part.labels)).backward()
        else:
            generator = torch.Generator().manual_seed(seed + STRIDE * part.index)
            judge.pull(answers, temperature, generator).backward()
        require_finite(recorder.terms, candidates.graph, part.images)
        part.tick()
        return recorder.terms.numpy()

    both = torch.from_numpy(batches.rows(measure))
    return FisherTerms(both[:, : len(columns)], both[:, len(columns) :])


def gradient_of(loss: Callable[[Any, Any], Tensor], answer: Any, batch: Any) -> Tensor:
    """A loss of the user's own, that must be finite and that a gradient comes from.

    Raises:
        UsageError: it is not.
    """
    found = loss(answer, batch)
    if not bool(found.isfinite()):
        raise UsageError(
            f"the loss {loss.__name__} must be finite. Got {float(found)}, of answers that are. "
            "Look at its logarithms and divisions, and at images without any target."
        )
    if not found.requires_grad:
        raise UsageError(
            f"no gradient comes from the loss {loss.__name__}: it must be computed from the "
            "outputs by operations of torch, without argmax, rounding, detach() or numpy."
        )
    return found


class _Recorder:
    """Runs the network; its backward pass then fills `terms`, `[n, 2 columns]`."""

    def __init__(self, candidates: Perturbations, columns: Sequence[Column], squares: bool) -> None:
        self.candidates, self.count, self.squares = candidates, len(columns), squares
        self.terms = torch.zeros(0, 2 * self.count, dtype=torch.float64)
        self.weights: dict[str, list[tuple[int, int]]] = {}
        self.tensors: dict[str, dict[int, list[int]]] = {}
        for index, (layer, part, bits) in enumerate(columns):
            if part == "weight":
                self.weights.setdefault(layer, []).append((index, bits))
            elif (tensor := candidates.tensor_of(layer)) and (tensor, bits) in candidates.grids:
                self.tensors.setdefault(tensor, {}).setdefault(bits, []).append(index)
        self.watch = Watch(candidates.graph, list(self.tensors), self._see_tensor)
        module = candidates.graph.module
        self.layers = {name: module.get_submodule(name) for name in self.weights}

    def run(self, images: Inputs, count: int) -> Any:
        """The answer, with a graph that reaches back to the first layer."""
        self.terms = torch.zeros(count, 2 * self.count, dtype=torch.float64)
        with hooked(m.register_forward_hook(self._see_layer(n)) for n, m in self.layers.items()):
            return self.watch.answer(reaching(images))

    def _see_layer(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            op, x = LayerOp.of(module), args[0].detach()

            def backward(grad: Tensor) -> None:
                weight, count = self.candidates.weight(name), len(self.terms)
                small = weight.numel() * count <= x.numel() + grad.numel()
                if op.kind == "conv" and len(x) == count and small and not self.squares:
                    # `u` is linear in dW: one pass for all widths, no larger than what it reads.
                    by_image = op.weight_gradients(x, grad, weight)
                    for index, bits in self.weights[name]:
                        noise = self.candidates.weights[name, bits].flatten()
                        self.terms[:, index] = (by_image @ noise).double().cpu()
                    return
                for index, bits in self.weights[name]:
                    noise = op.float(x, self.candidates.weights[name, bits], None)
                    self._record(index, grad, noise)

            _reached(out).register_hook(backward)

        return hook

    def _see_tensor(self, name: str, x: Tensor) -> Tensor:
        value = x.detach()

        def backward(grad: Tensor) -> None:
            for bits, indices in self.tensors[name].items():
                noise = self.candidates.grids[name, bits].noise(value)
                for index in indices:
                    self._record(index, grad, noise)

        _reached(x).register_hook(backward)
        return x

    def _record(self, index: int, grad: Tensor, noise: Tensor) -> None:
        images, product = len(self.terms), grad * noise
        if product.shape[0] % images:  # of no image, such as a table of positions
            # The images' own parts add up to it; they are independent with mean 0, so that its
            # square is the sum of theirs in expectation.
            product = torch.stack([product / math.sqrt(images)] * images)
        product = product.reshape(images, -1)  # windows and tokens of an image too
        self.terms[:, index] = product.sum(1).double().cpu()
        if self.squares:
            self.terms[:, self.count + index] = product.square_().sum(1).double().cpu()


def _reached(x: Tensor) -> Tensor:
    """A tensor that a gradient reaches, also where it comes from whole numbers alone."""
    return x if x.requires_grad or not x.is_floating_point() else x.requires_grad_(True)
