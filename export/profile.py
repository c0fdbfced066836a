"""Measure what each layer costs in the runtime, as integers and in float, and each boundary.

Four files of one network are measured: all integer, all float, and two in which integer and float
layers alternate. The runtime's profiler gives the time of every node of the first two. A node that
is no layer (an addition, a pooling, a conversion) is charged to the layer before it, the first ones
to the first layer. Node times are scaled so that they sum up to the measured time of the whole.
What the alternating files take beyond the sum of their layers is the cost of their boundaries, in
proportion to the elements that are converted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import fx

from mpq.cpu import this_cpu
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare
from mpq.latency import Edge, LatencyProfile, LayerLatency
from mpq.policy import LayerPolicy, Policy

from . import runtime
from .bench import interleave
from .certify import executed_nodes
from .lower import lower
from .onnx_file import serialize

RUNS = 40
"""Rounds for each file, and runs under the profiler."""
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""CPU flags that decide which kernels the runtime takes."""
Progress = Callable[[str], None]


def profile(
    graph: QuantGraph,
    *,
    threads: int = 1,
    batch: int = 1,
    runs: int = RUNS,
    progress: Progress | None = None,
) -> LatencyProfile:
    """Measure a network on this machine.

    Args:
        graph: in stage `float`; values of weights do not matter.
        threads: threads inside an operation.
        batch: images at a time.
        runs: rounds for each file, and runs under the profiler.
        progress: called with what is being done.

    Raises:
        ExportError: the network cannot be exported.
    """
    say = progress or (lambda _: None)
    names = list(graph.layers)
    say("exporting four files")
    files = four_files(graph)
    say("measuring the whole")
    totals = measure(files, threads=threads, batch=batch, runs=runs)
    say("measuring node by node")
    parts = [_layers(data, names, threads, batch, runs) for data in files[:2]]
    times = Times(cpu_identity(), f"onnxruntime {runtime.version()}", threads, batch)
    return profile_of(graph, times, totals, parts)


@dataclass(frozen=True, slots=True)
class Times:
    """Where times were measured and how: as in `LatencyProfile`."""

    cpu: str
    runtime: str
    threads: int
    batch: int


def four_files(graph: QuantGraph) -> list[bytes]:
    """The network as integers, in float, and with every second layer in float, both ways."""
    names = list(graph.layers)
    plain = serialize(lower(graph))
    integer, odd, even = (at_8_bits(graph, floats) for floats in ((), names[1::2], names[::2]))
    return [integer, plain, odd, even]


def profile_of(
    graph: QuantGraph,
    times: Times,
    totals: Sequence[float],
    parts: Sequence[dict[str, float]],
    target: str = "",
) -> LatencyProfile:
    """The profile that measured milliseconds give.

    Args:
        graph: in stage `float`.
        times: where they were measured.
        totals: of `four_files`.
        parts: of each layer, in the first two of them.
        target: as in `LatencyProfile`.
    """
    names = list(graph.layers)
    base, scaled = scaled_to(parts, totals[:2])
    layers = {n: LayerLatency(scaled[0][n], scaled[1][n]) for n in names}
    elements = {edge: graph.layers[edge[1]].in_elements * times.batch for edge in edges(graph)}
    rate = boundary_rate(
        layers, elements, base, [(names[1::2], totals[2]), (names[::2], totals[3])]
    )
    return LatencyProfile(
        **asdict(times),
        layers=layers,
        boundary_ms={edge: rate * count for edge, count in elements.items()},
        base_ms=base,
        target=target,
    )


def measure(
    models: Sequence[bytes | Path], *, threads: int = 1, batch: int = 1, runs: int = RUNS
) -> list[float]:
    """Median milliseconds of each model, in turns.

    With one thread it is that thread's CPU time: what else the machine does does not count.
    """
    runners = [_runner(model, threads, batch) for model in models]
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = 1e3 * interleave(runners, runs=runs, clock=clock)
    return [float(t) for t in np.median(times, axis=1)]


def edges(graph: QuantGraph) -> list[Edge]:
    """(from, to) for each layer and the last layer before it, along the data."""
    latest: dict[fx.Node, tuple[int, str] | None] = {}
    found: list[Edge] = []
    for index, node in enumerate(graph.module.graph.nodes):
        before = [latest.get(n) for n in node.all_input_nodes]
        source = max((b for b in before if b is not None), default=None)
        if node.op == "call_module" and str(node.target) in graph.layers:
            if source is not None:
                found.append((source[1], str(node.target)))
            source = (index, str(node.target))
        latest[node] = source
    return found


def cpu_identity() -> str:
    """Model of the CPU and those of its flags that decide kernels."""
    cpu = this_cpu()
    return ", ".join([cpu.name, *(flag for flag in FLAGS if flag in cpu.flags)])


def at_8_bits(graph: QuantGraph, floats: Sequence[str]) -> bytes:
    """The network at 8 bits, some layers in float; ranges do not change the time."""
    entries = [LayerPolicy(name=name, weight="float", activation="float") for name in floats]
    policy = Policy.uniform(8).with_layers(*entries)
    return serialize(lower(freeze(prepare(graph, policy))))


def _runner(model: bytes | Path, threads: int, batch: int) -> Callable[[], object]:
    loaded = runtime.session(model, threads=threads)
    feeds = runtime.noise(loaded, batch)
    return lambda: loaded.run(None, feeds)


def _layers(
    data: bytes, names: Sequence[str], threads: int, batch: int, runs: int
) -> dict[str, float]:
    """Milliseconds of each layer, with the nodes that are charged to it."""
    optimized = runtime.optimized_model(data)
    owner = charged_to(optimized.graph, executed_nodes(data, optimized))
    for index, node in enumerate(optimized.graph.node):
        node.name = f"n{index}"
    times = runtime.node_times(optimized.SerializeToString(), threads, batch, runs)
    found = dict.fromkeys(names, 0.0)
    for index, layer in enumerate(owner):
        found[layer] += 1e3 * times.get(f"n{index}", 0.0)
    return found


def charged_to(graph: onnx.GraphProto, executed: Mapping[str, int]) -> list[str]:
    """The layer that each node of an optimized graph is charged to.

    Args:
        graph: in the order of execution.
        executed: layer -> index of its matrix node.
    """
    layer_of = {index: name for name, index in executed.items()}
    latest: dict[str, tuple[int, str]] = {}
    owners: list[str | None] = []
    for index, node in enumerate(graph.node):
        if index in layer_of:
            source = (index, layer_of[index])
        else:
            source = max((latest[i] for i in node.input if i in latest), default=(-1, ""))
        owners.append(source[1] or None)
        if source[1]:
            latest.update((out, source) for out in node.output)
    first = layer_of[min(layer_of)]
    return [name or first for name in owners]


def scaled_to(
    parts: Sequence[dict[str, float]], totals: Sequence[float]
) -> tuple[float, list[dict[str, float]]]:
    """Milliseconds outside of nodes, and layers that sum up to what is left of the totals."""
    base = max(0.0, min(total - sum(p.values()) for p, total in zip(parts, totals, strict=True)))
    scaled = []
    for part, total in zip(parts, totals, strict=True):
        factor = (total - base) / max(sum(part.values()), 1e-9)
        scaled.append({name: factor * ms for name, ms in part.items()})
    return base, scaled


def boundary_rate(
    layers: Mapping[str, LayerLatency],
    elements: Mapping[Edge, int],
    base: float,
    measured: Sequence[tuple[Sequence[str], float]],
) -> float:
    """Milliseconds an element, by least squares through the origin over the mixed files."""
    counts, rests = [], []
    for floats, total in measured:
        kept = set(floats)
        spent = sum(c.float_ms if n in kept else c.integer_ms for n, c in layers.items())
        counts.append(sum(n for (a, b), n in elements.items() if (a in kept) != (b in kept)))
        rests.append(total - base - spent)
    weight = sum(c * c for c in counts)
    return (
        max(0.0, sum(c * r for c, r in zip(counts, rests, strict=True)) / weight) if weight else 0.0
    )
