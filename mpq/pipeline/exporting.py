"""`export`: from a quantized network to `model.onnx` with its proofs, and the float reference."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mpq import files, origins, rundir
from mpq.calls import Inputs
from mpq.data import DataSource, Normalization, sample_indices
from mpq.errors import CheckpointError, PolicyError, UsageError
from mpq.export import ExportResult, float_to_onnx, to_onnx
from mpq.export.ends import Asked
from mpq.export.form import Int4Format
from mpq.export.pixels import PixelInput
from mpq.graph.ir import QuantGraph
from mpq.pipeline.quantizing import Quantized
from mpq.pipeline.subject import Subject, policy_subject
from mpq.staging import together

if TYPE_CHECKING:
    from typing_extensions import Unpack

PixelLayout = Literal["nhwc", "nchw"]
logger = logging.getLogger(__name__)
OF_ONE_FILE = ("verify.json", "exact.json", "portability.json", "bench.jsonl", "report.html")
"""What a run holds on its `model.onnx`, beside the certificate."""
FLOAT = "float.onnx"
MOST, LEAST, MACS = 1000, 128, 5e10
"""`enough` images: as many as take so many multiplications, within these numbers."""


@dataclass(frozen=True, slots=True)
class Exporting:
    """How a file is written and judged.

    Args:
        int4_format: storage of 4-bit weights; None: what `min_runtime` takes.
        min_runtime: the oldest onnxruntime that must run the file.
        pixels: make the file take raw uint8 images in this layout; None: normalized ones.
        target: the kind of CPU to certify for; None: that of this computer.
        allow_float_fallback: accept layers that were promised as integers and run in float.
        ends: names of inputs and outputs, and which sizes are free (`mpq.export.ends`).
    """

    int4_format: Int4Format | None = None
    min_runtime: str | None = None
    pixels: PixelLayout | None = None
    target: str | None = None
    allow_float_fallback: bool = False
    ends: Asked = field(default_factory=Asked)


def export_run(
    found: Quantized,
    folder: Path,
    how: Exporting | None = None,
    *,
    images: int | None = None,
    seed: int = 0,
    reference: Subject | None = None,
    force: bool = False,
) -> ExportResult:
    """Export, certify and verify; write the files of a run, as one step.

    What else the run holds on another `model.onnx` goes.

    Args:
        found: the quantized network.
        folder: the run.
        how: the file is to be written; None: the defaults.
        images: test images to verify on (fewer if there are fewer; none without data); None: 1000,
            of a large network down to 128.
        seed: of the sample.
        reference: the float network, to be written beside as `float.onnx`.
        force: replace an existing file.

    Raises:
        ExportError: the file breaks a promise or does not answer as promised; nothing is written.
        UsageError: the file exists and `force` is off, or the run holds another network.
    """
    how, written = how or Exporting(), folder / "model.onnx"
    refuse_export(folder, force)
    _refuse_mixing(found, folder)
    with together(rundir.touch_run(folder)) as aside:
        result = export_file(found, aside / written.name, how, count=images, seed=seed)
        if not written.is_file() or written.read_bytes() != result.path.read_bytes():
            for name in OF_ONE_FILE:
                (aside / name).touch()  # what stands there was of another file
        files.write_text(aside / "certificate.json", result.certificate.to_json() + "\n")
        if result.verification is not None:
            files.write_text(aside / "verify.json", result.verification.to_json() + "\n")
        if reference is not None:
            export_float(reference, aside / FLOAT, **how.ends)
        elif not _is_reference(folder, found):
            (aside / FLOAT).touch()  # of another network
        _note(aside, folder, found)
    return replace(result, path=written)


def _note(aside: Path, folder: Path, found: Quantized) -> None:
    """Note what the files of an export were made from."""
    model = {"model.onnx": origins.identity(aside / "model.onnx"), **found.made_from}
    noted = {"model.onnx": dict(found.made_from), "certificate.json": model, "verify.json": model}
    noted[FLOAT] = {origins.WEIGHTS: found.subject.info.sha256}
    there = {n: m for n, m in noted.items() if (aside / n).is_file() and (aside / n).stat().st_size}
    origins.note(aside, folder, "export", there)


def _is_reference(folder: Path, found: Quantized) -> bool:
    """Whether the `float.onnx` of a run is that of a network."""
    noted = origins.origins(folder).get(FLOAT)
    return noted is not None and noted.made_from[origins.WEIGHTS] == found.subject.info.sha256


def _refuse_mixing(found: Quantized, folder: Path) -> None:
    """Refuse to put a file into a run of something else.

    Raises:
        UsageError: the run's policy or quantized network is not what `found` was made from.
    """
    for name in (*rundir.QUANTIZED, "policy.yaml"):
        there, then = folder / name, found.made_from.get(name)
        now = origins.identity(there) if there.is_file() else None
        if now is not None and then is not None and now != then:
            raise UsageError(
                f"{there} (hash {now[:8]}...) is not what the network to export was made from "
                f"(hash {then[:8]}...). Write elsewhere with -o."
            )


def export_file(
    found: Quantized,
    path: Path,
    how: Exporting,
    *,
    count: int | None = None,
    seed: int = 0,
    images: Inputs | None = None,
) -> ExportResult:
    """Write one file, certified and verified.

    Args:
        found: the quantized network.
        path: the file; one that exists is replaced.
        how: it is to be written.
        count: test images to verify on, as `images` of `export_run`.
        seed: of the sample.
        images: normalized `[N, C, H, W]` to verify on instead, or inputs (`mpq.calls`).

    Raises:
        ExportError: the file breaks a promise or does not answer as promised; nothing is written.
        UsageError: it is to take pixels, and nothing says how they are normalized.
    """
    pixels = None
    if how.pixels is not None:
        if not found.subject.info.normalize:
            raise UsageError("a file that takes pixels must be told how they are normalized.")
        norm = Normalization.parse(found.subject.info.normalize)
        pixels = PixelInput(norm, how.pixels == "nhwc")
    count = enough(found.graph) if count is None else count
    result = to_onnx(
        found.graph,
        path,
        images=held_out(found.subject, count, seed) if images is None else images,
        allow_float_fallback=how.allow_float_fallback,
        int4_format=how.int4_format,
        min_runtime=how.min_runtime,
        pixels=pixels,
        target=how.target,
        **how.ends,
    )
    most = found.policy.constraints.max_size_mb
    if most is not None and result.bytes > 1e6 * most:
        logger.warning(
            "the file has %s bytes, more than the max_size_mb %g of its policy, which was edited "
            "or is stored in another way. Try mpq analyze with a smaller --max-size-mb.",
            f"{result.bytes:,}",
            most,
        )
    return result


def enough(graph: QuantGraph) -> int:
    """Images to verify on where nobody says how many."""
    macs = sum(layer.macs for layer in graph.layers.values())
    return int(min(MOST, max(LEAST, MACS / max(macs, 1))))


def refuse_export(folder: Path, force: bool) -> None:
    """Stop before the work begins where a whole export is there already.

    One that lacks its certificate is completed.

    Raises:
        UsageError: it is there and `force` is off, or nothing can be written there.
    """
    partial = not (folder / "certificate.json").is_file()
    rundir.refuse_overwrite(folder / "model.onnx", force or partial)


def float_reference(
    found: Quantized, path: Path, source: DataSource, *, trust_pickle: bool = False
) -> Subject | None:
    """The float network that `path` was made from; None, said aloud, where it is gone or changed.

    A quantized network holds all that its own export needs, so this is no reason to fail.
    """
    try:
        return policy_subject(found.policy, path, source, weights=True, trust_pickle=trust_pickle)
    except (CheckpointError, PolicyError) as error:
        logger.warning("no float.onnx to compare with: %s", error)
        return None


def export_float(subject: Subject, path: Path, **ends: Unpack[Asked]) -> Path:
    """Write the float reference beside the quantized file (batch norm folded, nothing else)."""
    written: Path = float_to_onnx(subject.graph(), path, **ends)
    return written


def held_out(subject: Subject, count: int, seed: int) -> Inputs | None:
    """A seeded sample of what to compare on, as `Subject.tensor`; None without data or for none."""
    if subject.data is None or count == 0:
        return None
    source = subject.data.compared
    return subject.tensor(source.read(sample_indices(source, count, seed)))
