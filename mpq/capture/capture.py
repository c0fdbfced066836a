"""From a network to one graph of nodes that name what it does.

    Network -> fresh copy -> attention opened -> recorded -> replayed -> fx.GraphModule

Module paths survive and are the keys of a policy. A module whose forward cannot be recorded stays a
leaf of the graph, and recording starts again; if the network's own forward is the culprit there is
nothing to cut out, and the error names file, line and remedy.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import fx

from mpq.calls import described
from mpq.capture.attention import WindowAttention, open_attention
from mpq.capture.fresh import fresh
from mpq.capture.network import Network
from mpq.capture.record import Record, record
from mpq.capture.refuse import Refused, raised_at
from mpq.capture.replay import at_other_sizes, replay
from mpq.capture.running import unchanged
from mpq.errors import GraphError

logger = logging.getLogger(__name__)
MAX_ISLANDS = 64


@dataclass(frozen=True)
class Captured:
    """A network as a graph.

    Args:
        module: the graph, in eval mode; it takes `Network.inputs` in their order, and answers in
            plain tuples, lists and dicts.
        islands: paths of modules that could not be looked into, with the reason.
        frozen: what was decided by the example call and holds for every other, in words.
        sizes: why the graph holds at the sizes of the example only; empty: at any that run.
    """

    module: fx.GraphModule
    islands: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    sizes: str = ""


def capture(network: Network, *, replayed: bool = True) -> Captured:
    """Record a copy of a network in eval mode, and replay it on another batch size.

    Args:
        network: any module with an example call.
        replayed: False where the same network has been taken before, in another precision.

    Raises:
        GraphError: the network cannot be copied, run, recorded or replayed.
    """
    kind = type(network.module)
    if kind.__module__.startswith("torchvision.models.detection") and hasattr(
        kind, "eager_outputs"
    ):
        raise GraphError(
            f"the model must take a batch and answer with tensors. {kind.__name__} of torchvision "
            "takes a list of images. docs/tasks/detection.md shows how to wrap it."
        )
    network = Network(fresh(network.module), network.args, network.kwargs)
    open_attention(network)
    with unchanged(network.module):
        found, islands = _with_islands(network)
    module = fx.GraphModule(network.module, found.graph, type(network.module).__name__).eval()
    wrong = replayed and replay(network, module, found)
    if wrong:
        raise GraphError(
            f"the graph recorded from {type(network.module).__name__} must answer as the network "
            f"does, but {wrong}. Write what depends on the input with tensors and their sizes, "
            "without int(), float() and compiled functions."
        )
    sizes = at_other_sizes(network, module, found) if replayed else ""
    if any(isinstance(part, WindowAttention) for part in module.modules()):
        sizes = "the windows of its attention are laid out for the sizes of the example"
    for guard in reversed(found.guards):
        if not guard.node.users:
            found.graph.erase_node(guard.node)
    module.recompile()
    return Captured(module, islands, _frozen(network, found), sizes)


def _with_islands(network: Network) -> tuple[Record, dict[str, str]]:
    """Record, keeping modules that refuse whole."""
    islands: dict[str, str] = {}
    for _ in range(MAX_ISLANDS):
        try:
            return record(network, frozenset(islands)), islands
        except Refused as refused:
            if not refused.module:
                raise GraphError(
                    f"{type(network.module).__name__}.forward must be the same for every input, "
                    f"but {refused.why}. {refused.remedy}"
                ) from None
            islands[refused.module] = refused.why
            logger.warning("%s is kept as it is: %s", refused.module, refused.why)
        except Exception as error:
            raise _failed(network, error) from error
    raise GraphError(f"more than {MAX_ISLANDS} modules cannot be recorded; the first: {islands}")


def _failed(network: Network, error: Exception) -> GraphError:
    """The network does not run on its example, or not while it is watched."""
    why = str(error).partition("\n")[0] or type(error).__name__
    return GraphError(
        f"the model must run on {described(network.inputs)} but fails: {why} "
        f"({raised_at(error)}). Give the shape that it was made for."
    )


def _frozen(network: Network, found: Record) -> tuple[str, ...]:
    """What holds for every later call because it held for the example."""
    arguments = [f"argument {name}={value!r}" for name, value in network.constants.items()]
    sizes = [f"{guard.place} is {guard.answer}" for guard in found.guards]
    numbers = [f"{place} reads a size as a plain number" for place in found.fixed]
    return tuple(dict.fromkeys([*arguments, *sizes, *numbers]))
