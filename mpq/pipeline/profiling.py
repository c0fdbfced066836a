"""`profile`: measured latency of each layer on this machine, kept for the next time.

Profiles are kept under `$MPQ_CACHE` or `~/.cache/mpq`, under a key of the network's structure, the
CPU, the runtime's version, threads and batch. Weights have no part in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from mpq.capture.network import Network
from mpq.checkpoint import Loaded
from mpq.data.cache import cache_folder, trim
from mpq.errors import PolicyError, UsageError
from mpq.export import runtime
from mpq.export.certify import certify
from mpq.export.meta import from_metadata
from mpq.export.probe import measure_there
from mpq.export.profile import cpu_identity, measure, profile
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float
from mpq.latency import LatencyProfile

logger = logging.getLogger(__name__)
FORMAT = 1
"""Part of the key: raise it when measuring changes."""


@dataclass(frozen=True, slots=True)
class Check:
    """A prediction held against the file it is about: milliseconds, and the error in percent."""

    file: str
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """By how much the prediction is off, in percent of the measured time."""
        return 100 * (self.predicted_ms / self.measured_ms - 1)


def graph_of(loaded: Loaded) -> QuantGraph:
    """The float graph of a checkpoint that was opened.

    Raises:
        GraphError: the network cannot be traced.
    """
    return to_float(loaded.module, loaded.call or torch.zeros(2, *loaded.info.input))


def profile_module(
    module: nn.Module,
    size: tuple[int, int, int],
    *,
    call: Network | None = None,
    threads: int = 1,
    batch: int = 1,
    again: bool = False,
    on_start: Callable[[], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> LatencyProfile:
    """The profile of a network, measured or, where it was measured before, read.

    Args:
        module: the float network.
        size: channels, height and width of an image.
        call: an example call, of a network that takes anything else.
        threads: threads inside an operation.
        batch: images at a time.
        again: measure even if there is one.
        on_start: called before anything is measured; what it raises is raised.
        progress: called with what is being done.

    Raises:
        GraphError: the network cannot be traced.
        ExportError: it cannot be exported.
    """
    graph = to_float(module, call or torch.zeros(2, *size))
    path = cache_folder() / f"profile-{_key(graph, size, threads, batch)}.json"
    if path.is_file() and not again:
        try:
            return LatencyProfile.load(path)
        except UsageError as error:
            logger.warning("measuring again: %s", error)
    if on_start:
        on_start()
    found = profile(graph, threads=threads, batch=batch, progress=progress)
    try:
        found.save(path)
        trim(path)
    except OSError as error:
        logger.warning("the profile is not cached in %s: %s", path.parent, error.strerror)
    return found


def check(found: LatencyProfile, file: Path) -> Check:
    """Measure an exported file and hold the prediction for it against that.

    Which of its layers run as integers is read from what the runtime makes of it.

    Raises:
        UsageError: there is no such file.
        PolicyError: it carries no policy, or one of another network.
        ExportError: the runtime cannot load it.
    """
    if from_metadata(runtime.metadata(runtime.session(file)), str(file)) is None:
        raise PolicyError(f"{file} must be a file of mpq, with its policy inside. It has none.")
    predicted = found.predict({row.name: row.integer for row in certify(file).layers})
    if found.target:
        measured = measure_there(file, found)
    else:
        (measured,) = measure([file], threads=found.threads, batch=found.batch)
    return Check(str(file), predicted, measured)


def _key(graph: QuantGraph, size: tuple[int, int, int], threads: int, batch: int) -> str:
    layers = [asdict(layer) for layer in graph.layers.values()]
    machine = [cpu_identity(), runtime.version(), threads, batch]
    identity = json.dumps([FORMAT, machine, size, layers, str(graph.module.graph)])
    return hashlib.sha256(identity.encode()).hexdigest()[:24]
