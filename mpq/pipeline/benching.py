"""`bench`: model files side by side, on test images by name or as arrays. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from mpq.data import DataSet, DataSource, Normalization, load_arrays, open_data, sample_indices
from mpq.data.dataset import Samples
from mpq.data.stream import view
from mpq.errors import UsageError
from mpq.export import peers as peer_tools
from mpq.export import runtime
from mpq.export.bench import BenchRow, Timing, bench
from mpq.export.fileinfo import FileInfo, file_info
from mpq.files import scratch
from mpq.pipeline.wishes import Wishes
from mpq.shown import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)
Array = NDArray[Any]
Arrays = tuple[Samples, Array | None]
Tell = Callable[[str], None]
CALIBRATION = 512
COMPARED = 500
"""Samples that files are compared on, where there is no top-1."""


@dataclass(frozen=True, repr=False)
class Bench(Shown):
    """Model files side by side, the float file first."""

    TABLES = ("bench_table",)
    rows: tuple[BenchRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """A dict for each row."""
        return [row.to_dict() for row in self.rows]

    def plot(self) -> Figure:
        """Accuracy over bytes."""
        from mpq.report.plots import bench_plot  # matplotlib: a second of import

        return bench_plot(self.to_json())


@dataclass(frozen=True)
class Benching:
    """How files are measured.

    Args:
        float_file: what speed refers to. None: `float.onnx` beside the first file.
        normalize: of pixels, where the files do not say.
        timing: how latency is measured; None: one thread, one image, 200 rounds.
        peers: also onnxruntime's own int8 of the float model; a folder keeps the files.
        limit: images at most; None: all.
        seed: of their choice.
        wishes: a metric besides top-1, and batches to measure it on.
        outputs: kinds of outputs by name, over what the files say (`mpq.outputs`).
    """

    float_file: Path | None = None
    normalize: Normalization | None = None
    timing: Timing | None = None
    peers: Path | bool = False
    limit: int | None = None
    seed: int = 0
    wishes: Wishes | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)


def run_bench(
    paths: Sequence[Path],
    data: DataSource | Arrays,
    how: Benching | None = None,
    *,
    tell: Tell = lambda _: None,
    say: Tell = logger.info,
) -> Bench:
    """Measure ONNX files beside the float model.

    Args:
        paths: the files.
        data: where test images come from (by default from the data that the files name), or images
            and class ids: floats `[n, H, W, C]` as the files take them, and `[n]`.
        how: they are measured.
        tell: called with what is being done.
        say: called with what was chosen.

    Raises:
        UsageError, DataError: files or data that are missing or do not fit.
    """
    how = how or Benching()
    reference = how.float_file or float_beside(paths[0])
    info = _known([*paths, *([reference] if reference else [])])
    dataset, normalize = None, how.normalize
    kinds = _kinds(info, reference or paths[0]) | dict(how.outputs)
    judged = bool(kinds) and list(kinds.values()) != ["classes"]
    asked = how.wishes is not None and how.wishes.metric is not None
    if isinstance(data, DataSource):
        dataset = _open(data, info, how, say)
        images, labels = _load(dataset, how, say, judged=judged)
    else:
        images, labels = data
        normalize = normalize or Normalization.parse("none")
    if labels is not None and ((labels < 0).any() or judged):
        labels = None
    made: list[Path] = []
    with ExitStack() as stack:
        if how.peers:
            tell("onnxruntime's own int8")
            place = how.peers if isinstance(how.peers, Path) else stack.enter_context(scratch())
            scale = normalize or known_scale(info)
            made = _peers(place, reference, dataset, scale, how.seed)
        rows = bench(
            [*paths, *made],
            float_file=reference,
            images=images,
            labels=labels,
            normalize=normalize,
            outputs=kinds,
            timing=how.timing,
            progress=tell,
        )
        if asked and how.wishes is not None:
            from mpq.pipeline.judging import judge_files  # torch, which bench can do without

            named = (images, labels) if images is not None else None
            rows = judge_files(rows, how.wishes, named, normalize or known_scale(info), tell=tell)
    return Bench(tuple(rows))


def known_scale(info: FileInfo) -> Normalization | None:
    """How files say that their images are normalized."""
    return Normalization.parse(info.normalize) if info.normalize else None


def _kinds(info: FileInfo, file: Path) -> dict[str, str]:
    """The kinds of a file's outputs, as far as files say; it may have other names for them."""
    names, known = [str(o.name) for o in runtime.session(file).get_outputs()], info.outputs or {}
    if len(names) == len(known) and set(names) != set(known):
        return dict(zip(names, known.values(), strict=True))
    return {name: kind for name, kind in known.items() if name in names}


def float_beside(path: Path) -> Path | None:
    """The float file of the run that a file is in, if there is one."""
    reference = path.parent / "float.onnx"
    return reference if reference.is_file() else None


def _known(paths: Sequence[Path]) -> FileInfo:
    """What the files say of themselves; where one is silent, the next is asked."""
    infos = [file_info(path) for path in paths]
    told = {f.name: [getattr(info, f.name) for info in infos] for f in fields(FileInfo)}
    return FileInfo(**{name: next((v for v in vs if v is not None), None)
                       for name, vs in told.items()})  # fmt: skip


def _open(source: DataSource, info: FileInfo, how: Benching, say: Tell) -> DataSet | None:
    """The data set that is named, or that the files name; None for `none`."""
    name = source.data or info.data
    if name is None and how.wishes is not None and how.wishes.batches is not None:
        return None
    if info.inputs and not source.data and name in (None, "none"):
        name = "noise"
    if name is None:
        raise UsageError(
            "the files do not say which data they were made for. Name it with --data NAME, or "
            "measure latency, size and memory alone with --data none."
        )
    say(f"data: {name}")
    if name == "none":
        return None
    size, takes, pictures = info.input, info.inputs, info.pictures
    return open_data(name, root=source.root, size=size, takes=takes, pictures=pictures)


def _load(
    dataset: DataSet | None, how: Benching, say: Tell, *, judged: bool
) -> tuple[Samples | None, Array | None]:
    """Images to measure on, and labels; without these agreement with the float file is measured.

    `judged`: the network is no classifier, of which labels say nothing.
    """
    if dataset is None:
        return None, None
    split = dataset.test
    if not dataset.labelled or judged:
        why = "the network is no classifier" if judged else "they have no labels"
        say(f"{why}: accuracy is not measured, but agreement with the float file is")
        split = dataset.compared
    elif not len(split):
        say("they are too few for a test split: accuracy is not measured")
        return None, None
    labels = dataset.labelled and not judged
    most = how.limit if labels else how.limit or COMPARED
    if most is None or most >= len(split):
        images, known = load_arrays(split)
        return images, known if labels else None
    picked = sample_indices(split, most, how.seed)
    return view(split, picked), split.labels[picked] if labels else None


def _peers(
    folder: Path,
    reference: Path | None,
    dataset: DataSet | None,
    normalize: Normalization | None,
    seed: int,
) -> list[Path]:
    """The int8 files that onnxruntime itself makes of the float model."""
    if reference is None:
        raise UsageError("--peers quantizes the float model. Name it with --float FILE.")
    if dataset is None or (normalize is None and dataset.pixels):
        raise UsageError(
            "--peers calibrates on training images. Name them with --data, and how they are "
            "normalized with --normalize."
        )
    images = dataset.train.read(sample_indices(dataset.train, CALIBRATION, seed))
    feed = list(images.values()) if normalize is None or not dataset.pixels else (
        normalize.apply(images))  # fmt: skip
    static, dynamic = folder / "ort-static.onnx", folder / "ort-dynamic.onnx"
    return [
        peer_tools.onnxruntime_static(reference, static, feed),
        peer_tools.onnxruntime_dynamic(reference, dynamic),
    ]
