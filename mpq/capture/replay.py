"""Run a captured graph beside its network, on another batch size and fresh noise.

One run shows what was done, not what would be done: a capture may be quietly wrong where Python's
numbers or unseen code (TorchScript, extensions) carried a part of the input.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from mpq.axes import AXES, TRIED, resized
from mpq.calls import take
from mpq.capture.nested import leaves, plain_containers
from mpq.capture.network import Network
from mpq.capture.record import Record
from mpq.capture.running import as_written, unchanged

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""How far answers may be apart, to the largest value: attention is rewritten, and rounds."""


def replay(network: Network, graph: fx.GraphModule, record: Record | None = None) -> str:
    """Compare a capture with its network; what is wrong, or an empty string.

    Args:
        network: in eval mode; the example call it was captured with.
        graph: the capture.
        record: names the places that may be to blame.
    """
    verdicts = (_compare(network, other, graph, record) for other in _others(network))
    return next((wrong for wrong in verdicts if wrong is not None), "")


def at_other_sizes(network: Network, graph: fx.GraphModule, record: Record) -> str:
    """Why a capture holds at the sizes of its example only; empty: it holds wherever one runs.

    Args:
        network: in eval mode; the example call it was captured with.
        graph: the capture, with its guards.
        record: of the capture. Where nothing of it depends on sizes, nothing is run.
    """
    if not (record.guards or record.fixed or record.constants):
        return ""
    (noisy, *_), one = _others(network), slice(1)
    calls = resized((take(noisy.args, one), take(noisy.kwargs, one)), AXES)
    others = (Network(network.module, *call) for call in calls)
    verdicts = (_compare(network, other, graph, record) for other in others)
    ran = list(islice((wrong for wrong in verdicts if wrong is not None), TRIED))
    return next(filter(None, ran), "" if ran else f"{_name(network)} itself runs on no other size")


def _compare(
    network: Network, other: Network, graph: fx.GraphModule, record: Record | None
) -> str | None:
    """What is wrong with the answer to another call; None where the network takes no such call."""
    with unchanged(network.module), as_written():
        try:
            expected = _run(network.module, other.args, other.kwargs)
        except Exception as error:
            logger.info("%s does not run on %s: %s", _name(network), _sizes(other), error)
            return None
    broken: list[str] = []
    with unchanged(network.module):
        try:
            found = _run(_Guarded(graph, record, broken), tuple(other.inputs.values()), {})
            wrong = apart(expected, found)
        except Exception as error:
            wrong = f"the graph fails: {str(error).partition(chr(10))[0]}"
    if wrong and _unsteady(other, expected):
        logger.warning("%s answers differently each time, also in eval mode", _name(network))
        return ""
    return f"on {_sizes(other)} {wrong}{_blame(record, broken)}" if wrong else ""


def apart(expected: Any, found: Any) -> str:
    """How two answers differ, or an empty string."""
    one, two = (list(leaves(plain_containers(answer))) for answer in (expected, found))
    if len(one) != len(two):
        return f"the answer has {len(two)} parts instead of {len(one)}"
    return next((text for a, b in zip(one, two, strict=True) if (text := _differ(a, b))), "")


def _differ(expected: Any, found: Any) -> str:
    if not isinstance(expected, Tensor):
        return "" if expected == found else f"it answers {found!r} instead of {expected!r}"
    if not isinstance(found, Tensor) or expected.shape != found.shape:
        shape = list(found.shape) if isinstance(found, Tensor) else found
        return f"it answers with shape {shape} instead of {list(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(expected, found) else "an answer of whole numbers differs"
    if not expected.numel():
        return ""
    largest, far = (float(t.detach().abs().amax()) for t in (expected, (found - expected).float()))
    bound = max(TOLERANCE, 8 * torch.finfo(expected.dtype).eps) * largest
    if not math.isfinite(largest) or far <= bound:
        return ""
    return f"it is {far / (largest or 1):.1%} of the largest value apart"


def _others(network: Network) -> Iterator[Network]:
    """The call with noise in place of the example: one image more, or as many."""
    draw = torch.Generator().manual_seed(0)
    batch = network.batch
    for size in (1 if batch is None else batch + 1, batch):

        def change(tensor: Tensor, size: int | None = size) -> Tensor:
            leads = tensor.ndim > 0 and tensor.shape[0] == batch and size is not None
            rows = torch.arange(size if leads and size else len(tensor)) if tensor.ndim else None
            tensor = tensor if rows is None else tensor[rows.to(tensor.device) % len(tensor)]
            if not tensor.is_floating_point():
                return tensor.clone()
            noise = torch.randn(tensor.shape, generator=draw).to(tensor)
            spread = tensor.float().std() if tensor.numel() > 1 else torch.zeros(())
            return noise if not spread > 0 else tensor.mean() + noise * spread.to(tensor)

        yield network.map(change)


def _run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An answer, with the same random numbers each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*args, **kwargs)


def _unsteady(network: Network, expected: Any) -> bool:
    with unchanged(network.module), as_written(), torch.no_grad():
        return apart(expected, network.module(*network.args, **network.kwargs)) != ""


class _Guarded(fx.Interpreter):
    """Runs a graph and notes the comparisons of sizes that go another way."""

    def __init__(self, graph: fx.GraphModule, record: Record | None, broken: list[str]) -> None:
        super().__init__(graph)
        self.answers = {g.node: g for g in record.guards} if record else {}
        self.broken = broken

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        result = super().run_node(n)
        if n in self.answers and bool(result) != self.answers[n].answer:
            self.broken.append(str(self.answers[n].place))
        return result


def _blame(record: Record | None, broken: list[str]) -> str:
    """The places where Python's numbers may have carried what the input decides."""
    if record is None:
        return ""
    places = {
        "goes another way there": broken,
        "reads a size as a plain number": [str(place) for place in record.fixed],
        "made a constant": [str(place) for place in record.constants.values()],
    }
    described = [f"{', '.join(dict.fromkeys(at))} {what}" for what, at in places.items() if at]
    return f" ({'; '.join(described[:1])})" if described else ""


def _name(network: Network) -> str:
    return type(network.module).__name__


def _sizes(network: Network) -> str:
    shapes = [str(list(t.shape)) for t in leaves(network.inputs) if isinstance(t, Tensor)]
    return f"input {', '.join(shapes)}"
