"""Runs: what their stages share, where their folders lie, and how files get into them.

A run is a folder that carries the output of each stage under fixed names. `runs/.newest` lists
the runs used last, which may lie elsewhere; so a command that is given no input finds them there.
No torch here.
"""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mpq import lock
from mpq.errors import UsageError
from mpq.files import sweep, write_text
from mpq.processes import leading
from mpq.staging import READY, settle
from mpq.userimport import remember_trust, trust_run

logger = logging.getLogger(__name__)
REMEMBERED = 100
RUNS = Path("runs")
"""Where runs lie unless `-o` says otherwise, relative to the working directory."""
_POINTER = RUNS / ".newest"

FILES = {
    "profile.json": "mpq profile MODEL.pth",
    "policy.yaml": "mpq analyze MODEL.pth",
    "sensitivity.json": "mpq analyze MODEL.pth",
    "sensitivity.png": "mpq analyze MODEL.pth",
    "pareto.png": "mpq analyze MODEL.pth",
    "tensors.json": "mpq analyze MODEL.pth",
    "validation.json": "mpq analyze MODEL.pth --validate 50",
    "validation.png": "mpq analyze MODEL.pth --validate 50",
    "rank.json": "mpq rank ARCH",
    "rank.png": "mpq rank ARCH",
    "ptq.pth": "mpq ptq",
    "qat.pth": "mpq qat",
    "quantized.pth": "mpq ptq",
    "metrics.jsonl": "mpq qat",
    "ranges.json": "mpq report",
    "model.onnx": "mpq export",
    "float.onnx": "mpq export",
    "certificate.json": "mpq export",
    "verify.json": "mpq export",
    "exact.json": "mpq verify --exact",
    "portability.json": "mpq portability",
    "bench.jsonl": "mpq bench",
    "diagnosis.json": "mpq diagnose",
    "demo.json": "mpq demo",
    "report.html": "mpq report",
}
"""The files of a run, each with the command that writes it."""
STAGES = {"ptq": "ptq.pth", "qat": "qat.pth"}
"""The quantized network that each stage writes."""
FORMER = "quantized.pth"
"""What both stages wrote in 0.1; it is read until 0.3."""
QUANTIZED = (FORMER, *STAGES.values())
TORCH = (".pth", ".pt", ".ckpt")
"""How the names of checkpoints end."""
_SUFFIXES = {Path(name).suffix for name in FILES}

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, all)."""


def silent(phase: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Args:
        folder: where its files lie; None: nothing is kept.
        seed: of all randomness.
        device: where networks work, `cpu` or `cuda`.
        resume: go on from what an interrupted stage has left in `folder`.
        progress: called with how far each phase of a stage is.
    """

    folder: Path | None = None
    seed: int = 0
    device: str = "cpu"
    resume: bool = False
    progress: Progress = silent

    def phase(self, name: str) -> Callable[[int, int], None]:
        """`progress` for one phase, to be called with (done, all)."""
        return partial(self.progress, name)


def resolve_out(out: str | Path | None, default_name: str) -> Path:
    """The folder of a run: `out`, or `runs/DEFAULT_NAME`. It is not made yet (see `touch_run`).

    Code that the user has trusted in it before is trusted from here on.

    Raises:
        UsageError: something that is no folder has that name, or it is the name of a file.
    """
    folder = Path(out) if out is not None else RUNS / default_name
    if out is not None and folder.suffix in _SUFFIXES and not folder.exists():
        raise UsageError(
            f"-o must name a run folder, in which files have fixed names such as model.onnx. "
            f"Got {out}, the name of a file. Try -o {folder.with_suffix('')}."
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(
            f"-o must name a run folder, but {folder} is a file. Name another with -o."
        )
    trust_run(folder)
    return folder


def touch_run(folder: Path) -> Path:
    """Make the folder where it is missing, and note that it is the run used last.

    It remembers which code the user has trusted for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here, full = Path.cwd(), folder.resolve()
    # Relative where possible, so that a project folder can be moved with its runs.
    noted = full.relative_to(here) if full.is_relative_to(here) else full
    recent = [noted, *(run for run in _recent() if run != noted)]
    lines = "".join(f"{run.as_posix()}\n" for run in recent[:REMEMBERED])
    try:
        write_text(_POINTER, lines)
        sweep(RUNS, older_than=60.0)  # other commands write there too
    except OSError as error:
        told = "%s cannot be written (%s): name %s to the commands that follow"
        logger.warning(told, RUNS, error.strerror, folder)
    remember_trust(folder)
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the only one to write into a run while the block runs, and tidy up after killed commands.

    Of several processes the leading one holds it for all.

    Raises:
        UsageError: another command is writing there; the message says which.
    """
    if not leading():
        yield
        return
    with lock.held(folder / ".lock", folder):
        settle(folder)
        sweep(folder)
        yield


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """`held` for a file that is no run's."""
    if not leading():
        yield
        return
    with lock.held(path.parent / f".{path.name}.lock", path):
        sweep(path.parent, glob.escape(path.name))
        yield


def tidy(folder: Path) -> None:
    """Put in place what a killed command has finished, unless one that lives is about to."""
    if (folder / READY).is_dir():
        with suppress(UsageError), held(folder):
            pass


def newest_run(*needs: str) -> Path:
    """The newest run that holds one of these files: the one used last, else the newest by date.

    Raises:
        UsageError: no run holds one; the message names the command that writes the last of them.
    """
    for run in _recent():
        if any((run / name).is_file() for name in needs):
            return run
    found = [p for name in needs for p in RUNS.glob(f"*/{name}") if p.is_file()]
    if not found:
        there = [name for name in needs if name != FORMER]
        commands = " or ".join(f"`{FILES[name]}`" for name in there)
        raise UsageError(
            f"no run under {RUNS}/ holds a {' or a '.join(there)}. Run {commands} first, or name "
            "the file or its run."
        )
    return max(found, key=lambda p: p.stat().st_mtime_ns).parent


def last_run() -> Path | None:
    """The run used last, whatever it holds."""
    return next((run for run in _recent() if run.is_dir()), None)


def run_folder(path: Path) -> Path:
    """The run that a path is, or is a file of; else the path itself."""
    inside = path.name in FILES and path.is_file() and is_run(path.parent)
    return path.parent if inside else path


def run_file(path: Path, name: str) -> Path:
    """A file of that kind: `path`, or the one of that name in the run that it is or is of."""
    folder = run_folder(path)
    other = folder != path and path.suffix != Path(name).suffix
    return folder / name if other or path.is_dir() else path


def is_run(folder: Path) -> bool:
    """Whether a folder holds what only a run holds: a policy, a certificate or a sensitivity."""
    marks = ("policy.yaml", "certificate.json", "sensitivity.json")
    return any((folder / name).is_file() for name in marks)


def refuse_overwrite(path: Path, force: bool) -> None:
    """Stop before the work begins rather than replace what is there, or find no place after it.

    Raises:
        UsageError: `path` exists and `force` is not set, or nothing can be written there.
    """
    if path.is_dir():
        raise UsageError(f"{path} must be a file to write. Got a folder; name another with -o.")
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists already. Replace it with --force, or write elsewhere with -o."
        )
    place = next(p for p in path.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {place}: {error.strerror}. Write elsewhere with -o."
        ) from None


def require_kind(path: Path, *endings: str) -> None:
    """Refuse to write a file under a name that says that it is of another kind.

    Raises:
        UsageError: its suffix is one that mpq knows, but not one of `endings`.
    """
    if path.suffix in {*_SUFFIXES, *TORCH, ".safetensors"} - {*endings}:
        raise UsageError(
            f"the name of the file to write must end in {', '.join(endings)}. Got {path}. Try "
            f"{path.with_suffix(endings[0])}."
        )


def _recent() -> list[Path]:
    """Runs by last use, the latest first."""
    try:
        text = _POINTER.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    return [Path(line) for line in text.splitlines() if line.strip()]
