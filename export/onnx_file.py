"""Write one ONNX file: lower, certify, verify, and only then put it in its place."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from mpq.calls import Inputs, described, flat
from mpq.data import Normalization
from mpq.errors import ExportError
from mpq.files import write_bytes
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze
from mpq.graph.spec import check
from mpq.shown import Shown
from mpq.targets import get_target

from . import meta, runtime
from .certify import Certificate, certify
from .ends import Asked, Ends, ends_of
from .form import Int4Format, form_of
from .judges import judge
from .lower import Lowered, form_for, lower
from .outputs import file_names
from .pixels import PixelInput
from .verify import VerifyReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)
LIMIT = 2**31 - 1
"""Largest protobuf message: one file holds no more."""


@dataclass(frozen=True, repr=False)
class ExportResult(Shown):
    """An exported file with its proofs; `verification` is None when no images were given."""

    path: Path
    bytes: int
    certificate: Certificate
    verification: VerifyReport | None

    def to_json(self) -> dict[str, Any]:
        """Path, bytes and both proofs."""
        proofs = {"certificate": self.certificate, "verification": self.verification}
        content = {name: proof and json.loads(proof.to_json()) for name, proof in proofs.items()}
        return {"path": str(self.path), "bytes": self.bytes, **content}

    def shown(self) -> list[Any]:
        """The file, and the tables of both proofs."""
        whole = self.certificate.integer_macs_fraction
        line = f"{self.path}: {self.bytes:,} bytes; {whole:.1%} of the MACs run as integers"
        checked = ["not verified: no images"]
        if self.verification is not None:
            checked = [_checked(self.verification)]
        return [line, *checked, *self.certificate.notes, *self.certificate.shown()]


def _checked(found: VerifyReport) -> str:
    """How a file answers, in words: by class where it is a classifier, else output by output."""
    if found.top1_agreement is not None:
        return f"same class as the simulation on {found.top1_agreement:.2%} of {found.n:,} images"
    said = []
    for one in found.outputs:
        if one.agreement is not None:
            said.append(f"{one.name} {one.agreement:.2%} equal")
        elif one.sqnr_db is not None:
            said.append(
                f"{one.name} {f'{one.sqnr_db:.1f} dB' if isfinite(one.sqnr_db) else 'equal'}"
            )
    return f"against the simulation on {found.n:,} images: {', '.join(said)}"


def to_onnx(
    qg: QuantGraph,
    path: str | Path,
    *,
    images: Inputs | None = None,
    allow_float_fallback: bool = False,
    int4_format: Int4Format | None = None,
    min_runtime: str | None = None,
    pixels: PixelInput | None = None,
    target: str | None = None,
    **ends: Unpack[Asked],
) -> ExportResult:
    """Export a quantized graph to one ONNX file that onnxruntime runs as integers.

    The graph's policy travels in the file's metadata, and the certificate holds the file against
    it.

    Args:
        qg: a graph in stage `prepared` (it is frozen on a copy) or `frozen`.
        path: the file to write; missing folders are made.
        images: normalized `[N, C, H, W]` to verify on, or inputs (`mpq.calls`); without them
            nothing is compared.
        allow_float_fallback: write the file even if a layer that was promised as integer runs in
            float.
        int4_format: storage of 4-bit weights (`mpq.export.form`).
        min_runtime: the oldest onnxruntime that must run the file.
        pixels: make the file take raw uint8 images; None: normalized ones.
        target: where it must run; None: where the policy says.
        ends: `input_names` and `output_names` in place of the network's own, and which sizes are
            free: `dynamic=("batch", "height", "width")`; by default the batch alone. Where more is
            free, the file is verified at other sizes too.

    Raises:
        GraphError: the graph is not what was asked of it, or its sizes cannot be free.
        UsageError: `min_runtime` and `int4_format` contradict each other, or names do not fit.
        ExportError: an operation cannot be lowered, a promise is broken, or the file does not
            answer as the graph does. Nothing is written then.
    """
    frozen = qg if qg.stage == "frozen" else freeze(qg)
    check(frozen, "frozen")
    named = target or (frozen.policy.target if frozen.policy else None)
    form = form_for(
        frozen, int4_format=int4_format, min_runtime=min_runtime, target=get_target(named)
    )
    given = Ends.of(**ends)
    given.check(frozen)
    others = given.others(frozen, frozen.example if images is None else images)
    lowered = lower(frozen, form, pixels, given)
    data = serialize(lowered)
    certificate = certify(data, frozen, named)
    broken = certificate.broken()
    if broken and not allow_float_fallback:
        listed = "; ".join(f"{r.name}: {r.reason}" for r in broken[:5])
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ExportError(
            f"{len(broken)} of {len(frozen.plans)} layers do not run as asked: {listed}{more}. "
            "Set them to float or 16 bits in the policy, or pass --allow-float-fallback."
        )
    report = None
    for at_a_size in [] if images is None else [*others, images]:
        report = judge(frozen, data, lowered.sites, at_a_size, get_target(named), pixels)
        if report.failures():
            where = f" on {described(at_a_size)}" if others else ""
            raise ExportError(
                f"the file does not answer as the simulation does{where}: "
                + "; ".join(report.failures())
            )
    _write(data, Path(path))
    return ExportResult(Path(path), len(data), certificate, report)


def float_to_onnx(qg: QuantGraph, path: str | Path, **ends: Unpack[Asked]) -> Path:
    """Export a graph in stage `float`: the reference of every comparison.

    Raises:
        ExportError: as `to_onnx`, like the others.
    """
    given = Ends.of(**ends)
    given.check(qg)
    _write(serialize(lower(qg, ends=given)), Path(path))
    return Path(path)


def verify_file(
    qg: QuantGraph, path: Path, images: Inputs, target: str | None = None
) -> VerifyReport:
    """Compare a file that is there with the graph it was made from, as `to_onnx` does.

    Which value of the file belongs to which quantizer is found by lowering the graph again; a file
    of other operations (of another version, or with other options) is compared end to end only.

    Args:
        qg: a graph in stage `prepared` or `frozen`.
        path: the file.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`).
        target: where it is to be judged; None: where the graph's policy says.

    Raises:
        ExportError: the runtime cannot load or run the file.
        PolicyError: an unknown target.
    """
    runtime.session(path)  # refuses what is no model
    frozen = qg if qg.stage == "frozen" else freeze(qg)
    data, own = path.read_bytes(), flat(frozen.module, frozen.example)
    pixels = _pixels_of(path) if own[0].is_floating_point() else None
    proto = onnx.load_from_string(data)
    file_names(frozen, [str(o.name) for o in proto.graph.output])  # refuses what has others
    lowered = lower(frozen, form_of(proto), pixels, ends_of(proto))
    same = _operations(data) == _operations(serialize(lowered))
    if not same:
        logger.warning("%s was lowered in another way: comparing its answers only", path)
    named = target or (frozen.policy.target if frozen.policy else None)
    sites = lowered.sites if same else {}
    return judge(frozen, data, sites, images, get_target(named), pixels)


def _pixels_of(path: Path) -> PixelInput | None:
    """How a file takes raw images; None if it takes normalized ones.

    Raises:
        ExportError: it takes raw images and does not say how they are normalized.
    """
    loaded = runtime.session(path)
    if loaded.get_inputs()[0].type != "tensor(uint8)":
        return None
    takes = runtime.model_input(loaded)
    policy = meta.from_metadata(runtime.metadata(loaded), str(path))
    if policy is None or policy.model is None:
        raise ExportError(f"{path} takes raw images but does not say how it normalizes them.")
    return PixelInput(Normalization.parse(policy.model.normalize), takes.channels_last)


def _operations(data: bytes) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Operators and names of values; nothing of their contents."""
    nodes = onnx.load_from_string(data).graph.node
    return [(n.op_type, tuple(n.input), tuple(n.output)) for n in nodes]


def serialize(lowered: Lowered) -> bytes:
    """The bytes of a file, the graph's policy among its metadata.

    Raises:
        ExportError: more than 2 GB.
    """
    lowered.model.metadata_props.update(lowered.form.metadata())
    if lowered.policy is not None:
        lowered.model.metadata_props[meta.KEY] = meta.to_metadata(lowered.policy)
    proto: onnx.ModelProto = ir.to_proto(lowered.model)
    # Types of inner values can be inferred; for a small network they are a tenth of the file.
    del proto.graph.value_info[:]
    if proto.ByteSize() > LIMIT:
        raise ExportError(
            f"one ONNX file holds at most 2 GB. Got {proto.ByteSize()} bytes; lower the widths."
        )
    data: bytes = proto.SerializeToString()
    return data


def _write(data: bytes, path: Path) -> None:
    try:
        write_bytes(path, data)
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror}. Name a folder that can be written to."
        ) from None
