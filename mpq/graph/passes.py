"""The pipeline of graph passes, as lists, and the one runner that checks them all.

    trace -> [normalize, fold_bn, describe, besides] -> float
    float -> [annotate, insert] -> prepared -> freeze

The runner, not the passes, checks the stage, lints, recompiles, logs the count, and wraps what goes
wrong with the name of the pass. What they leave behind it holds against `mpq.graph.spec`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.calls import Inputs, arguments, call, take
from mpq.capture.capture import capture
from mpq.capture.fresh import fresh
from mpq.capture.network import Network
from mpq.capture.replay import apart
from mpq.capture.rounding import alike, in_float64, wide, widened
from mpq.errors import GraphError, MpqError
from mpq.graph.annotate import annotate, branch
from mpq.graph.besides import besides
from mpq.graph.describe import describe
from mpq.graph.fold_bn import fold_bn
from mpq.graph.freeze import freeze as freeze_pass
from mpq.graph.insert import insert
from mpq.graph.ir import QuantGraph, Stage
from mpq.graph.normalize import normalize
from mpq.graph.outputs import stated
from mpq.graph.spec import check
from mpq.graph.trace import trace
from mpq.outputs import settle
from mpq.policy import Policy

logger = logging.getLogger(__name__)
Pass = Callable[[QuantGraph], int]
REWRITES: tuple[Pass, ...] = (normalize, fold_bn)
TO_FLOAT: tuple[Pass, ...] = (*REWRITES, describe, besides)


def run(qg: QuantGraph, passes: tuple[Pass, ...], *, needs: Stage, gives: Stage) -> QuantGraph:
    """Run passes in order on `qg`, in place.

    Raises:
        GraphError: the graph is in another stage, a pass fails (its name is in the message), or
            what the passes leave behind is not what `gives` says.
    """
    if qg.stage != needs:
        raise GraphError(f"these passes need a graph in stage {needs!r}. Got {qg.stage!r} instead.")
    names = [getattr(one, "__name__", None) or getattr(one, "func", one).__name__ for one in passes]
    for one, name in zip(passes, names, strict=True):
        try:
            count = one(qg)
            qg.module.graph.lint()
            qg.module.recompile()
            qg.module.eval()  # what a pass adds begins in training mode
        except MpqError:
            raise
        except Exception as error:
            raise GraphError(f"pass {name} failed: {error}") from error
        logger.info("%s: %d", name, count)
    try:
        check(qg, gives)
    except GraphError as error:
        raise GraphError(f"after pass {', '.join(names)}: {error}") from None
    qg.stage = gives
    return qg


def to_float(
    model: nn.Module, example: Inputs | Network, outputs: Mapping[str, str] | None = None
) -> QuantGraph:
    """Trace, normalize and fold: the float graph that analysis and preparation start from.

    The model is not changed: the graph works on a copy of its parameters.

    Args:
        model: a trained network that answers with any tree of tensors.
        example: a call with a batch of at least two samples: one tensor such as `[N, C, H, W]`, a
            tuple of positional arguments, a dict of keyword arguments, or a `Network` of both.
            Arguments without a tensor stay as they are in the example.
        outputs: kinds of outputs by name, `{"boxes": "regression"}` (`mpq.outputs`); of others the
            kind is proposed.

    Raises:
        GraphError: the example does not fit the signature; the model cannot be traced or run, or
            has no layers; or the graph does not answer as the model does.
        UsageError: the tensors of the example differ in their first size; an output or a kind
            that there is not.
    """
    network = Network.of(model, example)
    qg = run(trace(model, network), TO_FLOAT, needs="traced", gives="float")
    qg.outputs = settle(qg.outputs, outputs or {})
    _check_answers(qg, network)
    return qg


@torch.no_grad()
def _check_answers(qg: QuantGraph, network: Network) -> None:
    """Refuse a graph in which passes lost a part of what the model computes."""
    model, name = fresh(network.module), type(network.module).__name__
    generator = torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor) -> Tensor:
        tensor = take(tensor, slice(1))
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    noise = network.map(noisy)

    def answer() -> Any:
        again = noise.map(Tensor.clone)  # for a network that overwrites its inputs
        return model(*again.args, **again.kwargs)

    expected = answer()
    wrong = apart(expected, call(qg.module, noise.map(Tensor.clone).example))
    if wrong and apart(expected, answer()):
        logger.warning("%s answers differently each time, also in eval mode", name)
    elif wrong and _rounds(qg, network, noise):
        logger.warning(
            "%s amplifies the rounding of float32: on noise %s from its own graph, and in float64 "
            "they agree. Is it trained?",
            name,
            wrong,
        )
    elif wrong:
        raise GraphError(
            f"the graph made from {name} must answer as the model does, but on noise {wrong}. Give "
            "the result of a step that overwrites a tensor a name of its own."
        )


def _rounds(qg: QuantGraph, network: Network, noise: Network) -> bool:
    """Whether a graph differs from its network by rounding alone, which the network amplifies.

    The same passes on the network in float64 must give the same graph, whose answer there is the
    network's, and whose weights are those of `qg` but for their rounding.
    """
    twin = Network(widened(fresh(network.module)), network.args, network.kwargs).map(wide)
    asked = Network(twin.module, noise.args, noise.kwargs).map(wide)
    again = asked.map(Tensor.clone)
    try:
        with in_float64():
            made = QuantGraph(capture(twin, replayed=False).module, twin.example)
            run(made, REWRITES, needs="traced", gives="traced")
            wrong = apart(
                twin.module(*asked.args, **asked.kwargs), call(made.module, again.example)
            )
    except Exception as error:  # what is made for float32 alone cannot be judged so
        logger.info("%s does not run in float64: %s", type(network.module).__name__, error)
        return False
    return not wrong and alike(made.module, qg.module)


def prepare(
    model: nn.Module | QuantGraph, policy: Policy, example: Inputs | Network | None = None
) -> QuantGraph:
    """Insert fake quantizers as a policy says; ready for calibration and training.

    Args:
        model: a module, or a graph in stage `float` (which is copied, not changed).
        policy: widths per layer.
        example: as for `to_float`, needed for a module.

    Returns:
        A graph in stage `prepared`; train its `.module`.

    Raises:
        GraphError: as `to_float`.
        PolicyError: the policy does not fit the network.
        UsageError: it states the kind of an output that there is not, or one that does not fit.
    """
    if isinstance(model, QuantGraph):
        qg = model.copy()
    elif example is None:
        raise GraphError("prepare needs an example input batch to trace a module.")
    else:
        qg = to_float(model, example)
    qg.outputs = settle(qg.outputs, policy.outputs)
    kinds = stated(qg.outputs)
    policy = policy if kinds == policy.outputs else policy.replace(outputs=kinds)
    named = partial(branch, policy=policy), partial(annotate, policy=policy)
    run(qg, named, needs="float", gives="annotated")
    return run(qg, (insert,), needs="annotated", gives="prepared")


def freeze(qg: QuantGraph) -> QuantGraph:
    """A frozen copy of a prepared graph: integer weights, constant scales, ready for export."""
    return run(qg.copy(), (freeze_pass,), needs="prepared", gives="frozen")


@torch.no_grad()
def outputs(qg: QuantGraph, names: list[str], images: Inputs) -> dict[str, Tensor]:
    """Outputs of the named modules for a batch of images, by name."""
    wanted, found = set(names), {}

    class Catch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            out = super().run_node(n)
            if n.op == "call_module" and n.target in wanted:
                found[str(n.target)] = out
            return out

    Catch(qg.module).run(*arguments(qg.module, images))
    return found
