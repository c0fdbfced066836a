"""Three-way verification: the simulation, onnxruntime unoptimized, onnxruntime at its defaults.

End to end on all given images, each output by its kind (`outputs.py`), and site by site on some of
them (how many integers differ, and by how many steps?). A site that differs by one step passes that
difference on, so the steps of deep sites are those of everything before them too: a deep network
that amplifies noise can end far from where it began without any layer being wrong. So each site is
also judged alone: the simulation is given the runtime's integers at all sites before it, and what
then differs is the error of the operations between, at most one step where a value falls on a tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.calls import Inputs, call, count, flat, leaves, split, take
from mpq.errors import ExportError
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import classifier
from mpq.hooks import hooked
from mpq.noise import EXACT_DB
from mpq.numerics import sqnr_db
from mpq.quant.fake_quant import FrozenQuant
from mpq.shown import Shown

from . import runtime, stem
from .certify import saturating_here
from .outputs import (
    MAX_OWN_STEP,
    MIN_AGREEMENT,
    MIN_SQNR_DB,
    OutputCheck,
    batch_for,
    by_name,
    check_outputs,
    in_steps,
)
from .pixels import PixelInput
from .reference import Reference

LAYER_IMAGES = 32
"""Images for the comparison site by site, at most; tensors of all sites are held at once, so there
are fewer where a batch has fewer: four images of 224 pixels are some 30 million integers."""


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """One quantizer, default options.

    Args:
        name: of the site.
        sqnr_db: SQNR of its integers in dB, what was inherited included.
        max_step: largest difference in steps, what was inherited included.
        equal_fraction: share of equal integers, likewise.
        own_step: largest difference in steps if all sites before it hold the runtime's integers.
        own_equal_fraction: share of equal integers then.
        own_step_unoptimized: `own_step` of the runtime with optimizations off.
    """

    name: str
    sqnr_db: float
    max_step: int
    equal_fraction: float
    own_step: int = 0
    own_equal_fraction: float = 1.0
    own_step_unoptimized: int = 0


@dataclass(frozen=True, slots=True)
class VerifyReport(Shown):
    """How the exported file answers, against the simulation.

    Args:
        n: images.
        top1_agreement: of a classifier, share of images with the same class, default options; None
            for a network that answers otherwise, whose figures `outputs` has.
        top1_agreement_unoptimized: the same with optimizations off.
        logits_sqnr_db: of the logits, default options; None as above.
        max_step: largest difference of any site, what it inherited included.
        layers: one row per site.
        outputs: one row per output.
        notes: why this computer cannot run the file exactly, or what the network itself makes of a
            single step, if it answers otherwise.
        target: where the file was judged.
        judged_by: `runtime` at hand, or `reference`: the integer kernels of a CPU that is not here.
        elsewhere: the same for the other targets that the file is for.
    """

    TABLES = ("verify_table",)
    n: int
    top1_agreement: float | None
    top1_agreement_unoptimized: float | None
    logits_sqnr_db: float | None
    max_step: int
    layers: tuple[SiteCheck, ...]
    outputs: tuple[OutputCheck, ...] = ()
    notes: tuple[str, ...] = ()
    target: str = ""
    judged_by: str = "runtime"
    elsewhere: tuple[VerifyReport, ...] = ()

    def failures(self) -> list[str]:
        """Bounds that are not met, in words."""
        found = list(self._of_classes())
        if self.logits_sqnr_db is None:
            found = [text for check in self.outputs for text in check.failures()]
        own = [text for row in self.layers for text in _too_far(row)]
        there = (f"{r.target}: {text}" for r in self.elsewhere for text in r.failures())
        return [*found, *own, *there, *self.notes]

    def _of_classes(self) -> Iterator[str]:
        # One image may always differ: with few images a single tie must not fail the file.
        least = min(MIN_AGREEMENT, 1 - 1.5 / self.n)
        for name in ("top1_agreement", "top1_agreement_unoptimized"):
            value = getattr(self, name)
            if value is not None and not value >= least:
                yield f"{name} is {value:.4f}, must be at least {least:.4f}"
        value = self.logits_sqnr_db
        if value is not None and not value >= MIN_SQNR_DB:  # a NaN fails too
            yield f"logits: SQNR is {value:.1f} dB, must be at least {MIN_SQNR_DB}"

    @property
    def agreement(self) -> float | None:
        """The least agreement of an output; None where all are quantities."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    @property
    def sqnr_db(self) -> float | None:
        """The least SQNR of an output in dB; None where all are exact."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=None)

    @property
    def max_own_step(self) -> int:
        """Largest difference that a site makes by itself, with optimizations or without."""
        return max((max(r.own_step, r.own_step_unoptimized) for r in self.layers), default=0)

    def to_json(self) -> str:
        """The contents of `verify.json`."""
        data = asdict(self)
        for report in (data, *data["elsewhere"]):
            for row in (report, *report["layers"], *report["outputs"]):
                for key in ("sqnr_db", "sqnr_db_unoptimized", "logits_sqnr_db"):
                    if row.get(key) is not None:
                        row[key] = min(row[key], EXACT_DB)
        return json.dumps(data, indent=1)


def _too_far(row: SiteCheck) -> Iterator[str]:
    own = {"default options": row.own_step, "optimizations off": row.own_step_unoptimized}
    for options, step in own.items():
        if step > MAX_OWN_STEP:
            yield (
                f"{row.name}: {step} steps off by itself with {options}, must be at most "
                f"{MAX_OWN_STEP}"
            )


@torch.no_grad()
def verify(
    qg: QuantGraph,
    model: bytes,
    sites: dict[str, str],
    images: Inputs,
    *,
    batch: int = 250,
    pixels: PixelInput | None = None,
    reference: Reference | None = None,
) -> VerifyReport:
    """Compare a frozen graph with its exported file.

    Args:
        qg: the graph in stage `frozen` (or `float`, for a float file).
        model: bytes of the file.
        sites: site name -> name of the value that holds its integers.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`).
        batch: images at a time; fewer where outputs are large maps.
        pixels: the file takes raw images, of which `images` were made.
        reference: what answers in place of the runtime's default options.

    Raises:
        ExportError: the runtime cannot load or run the file, the file has other outputs, or there
            are no images.
    """
    total, batch = count(images), batch_for(qg, batch)
    if total == 0:
        raise ExportError("verification needs at least one image.")
    qg.module.eval()
    if pixels is None:
        feed: list[NDArray[Any]] = [t.numpy() for t in flat(qg.module, images)]
    else:
        assert isinstance(images, Tensor)
        raw = pixels.pixels(images.numpy())
        images = torch.from_numpy(pixels.normalize.apply(raw))
        feed = [raw if pixels.channels_last else raw.transpose(0, 3, 1, 2)]
    parts = [_rows(feed, slice(at, at + batch)) for at in range(0, total, batch)]
    checks = check_outputs(qg, model, zip(split(images, batch), parts, strict=True), reference)
    few = slice(0, min(LAYER_IMAGES, batch))
    looked_at = take(images, few)
    rows, pairs = _check_sites(qg, model, sites, looked_at, _rows(feed, few), reference)
    checks = in_steps(qg, checks, pairs)
    logits = checks[0] if classifier(qg.outputs) else OutputCheck("", "ignored")
    report = VerifyReport(
        n=total,
        top1_agreement=logits.agreement,
        top1_agreement_unoptimized=logits.agreement_unoptimized,
        logits_sqnr_db=logits.sqnr_db,
        max_step=max((r.max_step for r in rows), default=0),
        layers=rows,
        outputs=checks,
    )
    if reference is not None:
        report = replace(report, judged_by="reference")
    if not report.failures():
        return report
    notes = saturating_here(model) if reference is None else ()
    owns = [step for row in rows for step in (row.own_step, row.own_step_unoptimized)]
    if rows and max(*owns, *(c.own_step or 0 for c in checks)) <= MAX_OWN_STEP:
        notes = (*notes, _amplified(qg, list(sites), looked_at))
    return replace(report, notes=notes)


def _amplified(qg: QuantGraph, sites: list[str], images: Inputs) -> str:
    """How far the simulation is from itself with one integer of its input a step off."""
    seen: list[str] = []

    def visit(site: str, ints: Tensor) -> Tensor:
        seen.append(site)
        if len(seen) > 1:
            return ints
        moved = ints.reshape(len(ints), -1).int()
        moved[:, moved.shape[1] // 2] ^= 1
        return moved.reshape(ints.shape)

    want, have = leaves(call(qg.module, images)), leaves(_walk(qg, sites, images, visit))
    floats = [name for name, answer in want.items() if answer.is_floating_point()]
    apart = min((sqnr_db(want[name], have[name]) for name in floats), default=0.0)
    return (
        f"no layer alone is more than {MAX_OWN_STEP} step off, and one such step at one integer of "
        f"the input takes the simulation {apart:.1f} dB from itself: does the network amplify "
        "steps because it is not trained, or are these images that it does not know?"
    )


def _rows(feed: list[NDArray[Any]], rows: slice) -> list[NDArray[Any]]:
    return [np.ascontiguousarray(x[rows]) if x.ndim else x for x in feed]


Pair = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What the simulation answers, given the runtime's integers, and what the runtime answers."""


def _check_sites(
    qg: QuantGraph,
    model: bytes,
    sites: dict[str, str],
    images: Inputs,
    feed: list[NDArray[Any]],
    reference: Reference | None,
) -> tuple[tuple[SiteCheck, ...], list[Pair]]:
    if not sites:
        return (), []
    proto = onnx.load_from_string(model)
    blocked = stem.blocked(proto.graph)
    ends = [str(o.name) for o in proto.graph.output]
    for name in sites.values():
        if name not in ends:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    tapped, runs, answers = proto.SerializeToString(), [], []
    for on in (True, False):
        names = [*ends, *sites.values()]
        if on and reference is not None:
            values = reference.values(tapped, feed, names)
        else:
            values = runtime.values(tapped, feed, names, optimize=on)
        runs.append({site: _ints(values[v], v in blocked) for site, v in sites.items()})
        answers.append(by_name(qg, values, ends))
    default = runs[0]
    free: dict[str, Tensor] = {}
    _walk(qg, list(sites), images, lambda site, ints: free.setdefault(site, ints))
    (own, given), (own_plain, given_plain) = (_own(qg, run, images) for run in runs)
    rows = tuple(
        SiteCheck(
            site.removeprefix("quantizers."),
            sqnr_db(free[site].float() - zero, default[site].reshape(free[site].shape) - zero),
            *_differences(free[site], default[site]),
            *own[site],
            own_plain[site][0],
        )
        for site in sites
        if site in free  # what runs only under a condition did not run
        for zero in [float(qg.module.get_buffer(f"{site}.zero_point"))]
    )
    return rows, list(zip((given, given_plain), answers, strict=True))


def _own(
    qg: QuantGraph, given: dict[str, Tensor], images: Inputs
) -> tuple[dict[str, tuple[int, float]], dict[str, Tensor]]:
    """What each site does, and the answer, if the simulation is given the runtime's integers."""
    found: dict[str, tuple[int, float]] = {}

    def compare(site: str, ints: Tensor) -> Tensor:
        found[site] = _differences(ints, given[site])
        return given[site].reshape(ints.shape)

    return found, leaves(_walk(qg, list(given), images, compare))


def _differences(want: Tensor, have: Tensor) -> tuple[int, float]:
    """Largest difference in steps, and the share of equal integers."""
    step = (want.int() - have.reshape(want.shape).int()).abs()
    return int(step.max()), float((step == 0).double().mean())


def _walk(
    qg: QuantGraph, sites: list[str], images: Inputs, visit: Callable[[str, Tensor], Tensor]
) -> Any:
    """Run the simulation; each quantizer gives what `visit` makes of its site and integers."""

    def at(site: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            assert isinstance(module, FrozenQuant)
            zero, narrow = module.zero_point.int(), module.zero_point.dtype == torch.uint8
            ints = torch.round(out / module.scale) + zero
            ints = visit(site, ints.to(torch.uint8 if narrow else torch.int32))
            return (ints.to(out.dtype) - zero) * module.scale

        return hook

    with hooked(qg.module.get_submodule(s).register_forward_hook(at(s)) for s in sites):
        return call(qg.module, images)


def _ints(value: NDArray[Any], blocked: bool) -> Tensor:
    """Integers of the runtime as the simulation has them."""
    value = stem.plain(value) if blocked else value
    return torch.from_numpy(value if value.dtype == np.uint8 else value.astype(np.int32))
