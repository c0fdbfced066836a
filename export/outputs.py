"""The outputs of a file against those of the simulation, each judged by its kind.

End to end, on all images: choices must agree, quantities must be near in decibels, exact outputs
equal. What quantization moves is not equal to the last place, so an exact output that depends on
layers (the index of an argmax) is judged by agreement as a choice is. Of choices among places or
moments many hold nothing (the cells of a detector), and their best class is a tie that one step
decides: a class that the simulation holds to be as good counts as equal. These and quantities are
judged once more by themselves: with the runtime's own integers at all sites the simulation must
give the runtime's values, as no step lies between that could be rounded otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from mpq.calls import call, leaves
from mpq.errors import ExportError
from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of, moves
from mpq.graph.outputs import output_nodes
from mpq.outputs import Tally
from mpq.policy import OutputKind
from mpq.quant.fake_quant import FrozenQuant

from . import runtime
from .ends import Ends
from .reference import Reference

MIN_AGREEMENT = 0.99
"""Least share of choices in which simulation and runtime must agree."""
MIN_SQNR_DB = 15.0
"""Least SQNR of an output of floats. A broken layer is near or below 0 dB."""
MAX_OWN_STEP = 1
"""Largest difference of what is given the runtime's own integers, in steps."""
STEPPED = ("regression", "places", "sequence")
"""Kinds whose values are held against each other in steps."""
VALUES = 2**24
"""Values of outputs that are answered at a time, about; large maps come a few images at a time."""


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """One output, simulation against file.

    Args:
        name: of the output.
        kind: what it is judged as (`mpq.outputs`).
        n: choices or values that were compared; 0 for an ignored output.
        agreement: share of equal choices or exact values, default options; None for quantities. Of
            places and sequences, ties included (`mpq.outputs.TIE`).
        agreement_unoptimized: the same with optimizations off.
        sqnr_db: SQNR in dB, default options; None where there are no floats.
        sqnr_db_unoptimized: the same with optimizations off.
        max_step: largest difference of a value, what was inherited included, in steps of the
            quantizer whose grid it lies on; without one, in 255ths of its range. None for the
            logits of images, and for exact outputs.
        own_step: the same where all sites hold the runtime's integers; the larger of both options.
        quantized: whether it depends on a layer.
    """

    name: str
    kind: str
    n: int = 0
    agreement: float | None = None
    agreement_unoptimized: float | None = None
    sqnr_db: float | None = None
    sqnr_db_unoptimized: float | None = None
    max_step: float | None = None
    own_step: float | None = None
    quantized: bool = True

    def failures(self) -> Iterator[str]:
        """Bounds that are not met, in words."""
        # One choice may always differ: with few images a single tie must not fail the file.
        least = min(MIN_AGREEMENT, 1 - 1.5 / max(self.n, 1)) if self.quantized else 1.0
        said = f"output {self.name} ({self.kind})"
        for name in ("agreement", "agreement_unoptimized"):
            value = getattr(self, name)
            if value is not None and not value >= least:
                yield f"{said}: {name} is {value:.4f}, must be at least {least:.4f}"
        for name in ("sqnr_db", "sqnr_db_unoptimized"):
            value = getattr(self, name)
            if value is not None and not value >= MIN_SQNR_DB:  # a NaN fails too
                yield f"{said}: {name} is {value:.1f}, must be at least {MIN_SQNR_DB}"
        if self.own_step is not None and not self.own_step <= MAX_OWN_STEP:
            yield (
                f"{said}: {self.own_step:.3g} steps off by itself, must be at most {MAX_OWN_STEP}"
            )


def batch_for(qg: QuantGraph, batch: int) -> int:
    """Images at a time: `batch`, or fewer where a layer or the outputs are large maps."""
    values = sum(math.prod(output.evidence.shape) for output in qg.outputs.values())
    return max(1, min(qg.batch(batch), VALUES // max(values, 1)))


@torch.no_grad()
def check_outputs(
    qg: QuantGraph,
    model: bytes,
    parts: Iterable[tuple[Any, list[NDArray[Any]]]],
    reference: Reference | None = None,
) -> tuple[OutputCheck, ...]:
    """Compare every output end to end.

    Args:
        qg: the simulation.
        model: bytes of the file.
        parts: images in batches: as the simulation takes them, and as the file does.
        reference: what answers in place of the runtime's default options.

    Raises:
        ExportError: the file has other outputs, or of other shapes.
    """
    default, plain = (runtime.session(model, optimize=on) for on in (True, False))
    grids = _grids(qg)
    tallies: dict[str, tuple[Tally, Tally]] = {}
    for inputs, feed in parts:
        simulated = leaves(call(qg.module, inputs))
        tallies = tallies or {name: _tallies(output.kind, grids.get(name), simulated[name])
                              for name, output in qg.outputs.items()}  # fmt: skip
        lone = feed[0] if len(feed) == 1 else feed  # of images, the layout is that of the file
        many = max(len(x) for x in feed if x.ndim)
        if reference is None:
            found = runtime.answers(default, lone, batch=many)
        else:
            found = reference.answers(model, lone)
        for which, answers in enumerate((found, runtime.answers(plain, lone, batch=many))):
            answered = by_name(qg, answers, list(answers))
            for name, want in simulated.items():
                if qg.outputs[name].kind != "ignored":
                    tallies[name][which].add(want, like(name, answered[name], want))
    return tuple(_check(qg, name, *pair) for name, pair in tallies.items())


def _tallies(kind: OutputKind, grid: float | None, answer: Tensor) -> tuple[Tally, Tally]:
    """For both ways to run a file."""
    step = (grid or _step_of(answer)) if kind in STEPPED else 0.0
    return Tally(kind, step), Tally(kind, step)


def _step_of(values: Tensor) -> float:
    """What counts as a step of values that lie on no grid."""
    return float(values.max() - values.min()) / 255 if values.numel() else 0.0


def _check(qg: QuantGraph, name: str, default: Tally, plain: Tally) -> OutputCheck:
    output = qg.outputs[name]
    found = OutputCheck(name, output.kind, quantized=output.evidence.quantized)
    if output.kind == "ignored":
        return found
    one, other = default.result(), plain.result()
    return replace(
        found,
        n=one.n,
        agreement=one.agreement,
        agreement_unoptimized=other.agreement,
        sqnr_db=one.sqnr_db,
        sqnr_db_unoptimized=other.sqnr_db,
        max_step=one.largest if output.kind in STEPPED else None,  # in steps soon: `in_steps`
    )


def in_steps(
    qg: QuantGraph,
    checks: Iterable[OutputCheck],
    pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
) -> tuple[OutputCheck, ...]:
    """Differences of values in steps, with what they make by themselves.

    Args:
        qg: the simulation.
        checks: of all outputs.
        pairs: of each way to run the file, what the simulation answers if all sites hold the
            runtime's integers, and what the runtime answers; none if sites are not known.
    """
    grids = _grids(qg)
    return tuple(_in_steps(c, grids.get(c.name), pairs) for c in checks)


def _in_steps(
    check: OutputCheck,
    step: float | None,
    pairs: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
) -> OutputCheck:
    if check.max_step is None:
        return check
    own = 0.0
    for simulated, answered in pairs:
        want = simulated[check.name].double()
        step = step or _step_of(want) or 1.0
        have = like(check.name, answered[check.name], want).double()
        apart = torch.where(want == have, 0.0, (want - have).abs())
        own = max(own, float(apart.nan_to_num(nan=math.inf).max()) / step if apart.numel() else 0.0)
    return replace(
        check,
        max_step=check.max_step / step if step else None,
        own_step=own if pairs else None,
    )


def by_name(
    qg: QuantGraph, answers: Mapping[str, NDArray[Any]], ends: Sequence[str]
) -> dict[str, Tensor]:
    """What a file answers, by the names of the simulation's outputs.

    Args:
        qg: the simulation.
        answers: values of the file by name.
        ends: the file's outputs.

    Raises:
        ExportError: it lacks one of them.
    """
    names = zip(qg.outputs, file_names(qg, ends), strict=True)
    return {name: torch.from_numpy(answers[end]) for name, end in names}


def file_names(qg: QuantGraph, ends: Sequence[str]) -> tuple[str, ...]:
    """What a file with the outputs `ends` calls those of a graph; other names are in its order.

    Raises:
        ExportError: it has not as many.
    """
    own = Ends().names(qg)[1]
    if len(ends) < len(own):
        missing = [name for name in own if name not in ends]
        raise ExportError(
            f"the file must answer with {', '.join(own)}, but it has no output "
            f"{', '.join(missing)}. Got {', '.join(ends)}; export it again."
        )
    if len(ends) > len(own):
        raise ExportError(
            f"the file must answer with {', '.join(own)} and nothing else. Got {', '.join(ends)}."
        )
    return own if set(own) == set(ends) else tuple(ends)


def like(name: str, answered: Tensor, simulated: Tensor) -> Tensor:
    """An output of a file that has the simulation's shape; sizes of 1 may be missing.

    Raises:
        ExportError: it has another.
    """
    plain = [[n for n in t.shape if n != 1] for t in (answered, simulated)]
    if plain[0] != plain[1]:
        raise ExportError(
            f"output {name} of the file must have shape {list(simulated.shape)} as the simulation "
            f"gives it. Got {list(answered.shape)}."
        )
    return answered.reshape(simulated.shape)


def _grids(qg: QuantGraph) -> dict[str, float]:
    """The step of each output that a quantizer gives, or that only moves its values."""
    modules: dict[str, Any] = dict(qg.module.named_modules())
    kinds = {node: kind_of(node, modules) for node in qg.module.graph.nodes}
    found: dict[str, float] = {}
    for name, start in output_nodes(qg.module).items():
        node: fx.Node = start
        while moves(node, kinds) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, FrozenQuant):
            found[name] = float(module.scale)
    return found
