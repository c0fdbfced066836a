"""Other runtimes on this computer, each a process of its own that reads a job and leaves a result.

A job is a folder: `job.json` names the model, the tensors that stand one after the other in
`feeds.bin`, and how they are to be run; the runtime leaves `result.json`, `outputs.bin` and, where
it can, `optimized.onnx`, the graph that it really ran. The programs are in `runners/`, and what
installs a runtime is `runners/install.sh`: below one folder, and nowhere else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpq.errors import ExportError, UsageError, nearest
from mpq.target import Arithmetic, Target
from mpq.targets import this_target

from . import runtime

Array = NDArray[Any]
RUNNERS = Path(__file__).resolve().parent / "runners"
SECONDS = 1800
"""The longest that a runtime may take for one job."""
USUAL = "cortex-a76"
"""The one that stands for ARM where one is enough."""
CPUS = ("cortex-a53", "cortex-a76", "neoverse-v1", "max")
"""ARM CPUs that are emulated: without dot product, with it, with i8mm, with all (SME included)."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """One runtime.

    Args:
        name: as the table has it.
        arithmetic: whose kernels it has; None: its own, which no reference knows.
        command: the words before the folder of a job, and those after it.
        install: the name by which `install.sh` knows it; empty where nothing is to be installed.
        there: whether it can be run now.
        emulated: whether its CPU is, so that its times say nothing.
    """

    name: str
    arithmetic: Arithmetic | None
    command: tuple[tuple[str, ...], tuple[str, ...]]
    install: str = ""
    there: bool = True
    emulated: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a runtime made of a job: its version, outputs by name, seconds of each timed run."""

    version: str
    outputs: dict[str, Array]
    seconds: tuple[float, ...]
    layers: tuple[int, int] | None = None
    optimized: bytes | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What is run.

    Args:
        feeds: inputs by name.
        batch: rows at a time; 0: all inputs whole, whatever their first axis is.
        one: rows of a timed run.
        runs: timed runs.
        optimize: the runtime's default optimizations, or none at all.
    """

    feeds: Mapping[str, Array] = field(default_factory=dict)
    batch: int = 0
    one: int = 1
    runs: int = 0
    optimize: bool = True


def home() -> Path:
    """The folder of installed runtimes: `$MPQ_RUNTIMES`, or one in the user's cache."""
    named = os.environ.get("MPQ_RUNTIMES")
    return Path(named) if named else Path.home() / ".cache" / "mpq-runtimes"


def runtimes() -> list[Foreign]:
    """All runtimes known here, installed or not, the one that mpq itself uses first."""
    place = home()
    here = this_target().arithmetic
    job = str(RUNNERS / "onnxruntime_job.py")
    found = [Foreign("onnxruntime", here, ((sys.executable, job), ()))]
    for python in sorted(place.glob("onnxruntime-1.*/bin/python")):
        name = python.parent.parent.name
        found.append(Foreign(name, here, ((str(python), job), ())))
    for name, short in (("onnxruntime-node", "node"), ("onnxruntime-web", "web")):
        package = place / "node" / "node_modules" / name
        command = ("node", str(RUNNERS / "job.mjs")), (name, str(place / "node"))
        there = package.is_dir() and shutil.which("node") is not None
        found.append(Foreign(name, "wasm" if short == "web" else here, command, short, there))
    emulated = place / "arm64"
    there = (emulated / "qemu/usr/bin/qemu-aarch64").exists() and (emulated / "site").is_dir()
    for cpu in CPUS:
        name = f"onnxruntime-arm64 {cpu}"
        words = _emulated(emulated, cpu, job)
        found.append(Foreign(name, "arm64", (words, ()), "arm64", there, emulated=True))
    python = place / "openvino" / "bin" / "python"
    words = (str(python), str(RUNNERS / "openvino_job.py"))
    found.append(Foreign("openvino", None, (words, ()), "openvino", python.exists()))
    return found


def _emulated(place: Path, cpu: str, job: str) -> tuple[str, ...]:
    root = place / "root"
    variables = {
        "PYTHONPATH": place / "site",
        "PYTHONHOME": root / "usr",
        "LD_LIBRARY_PATH": root / "usr/lib/aarch64-linux-gnu",
    }
    settings = [word for key, value in variables.items() for word in ("-E", f"{key}={value}")]
    qemu = str(place / "qemu/usr/bin/qemu-aarch64")
    python = str(root / "usr/bin/python3.13")
    return (qemu, "-cpu", cpu, "-L", str(root), *settings, python, "-S", job)


def chosen(names: tuple[str, ...]) -> list[Foreign]:
    """The runtimes of these names, or whose names begin so; all for none.

    Raises:
        UsageError: a name that no runtime has.
    """
    known = runtimes()
    for name in names:
        if not any(r.name.startswith(name) for r in known):
            listed = [r.name for r in known]
            raise UsageError(
                f"runtime must be one of {', '.join(listed)}. Got {name!r}{nearest(name, listed)}"
            )
    exact = {r.name for r in known}.intersection(names)
    begin = tuple(name for name in names if name not in exact)
    return [r for r in known if not names or r.name in exact or r.name.startswith(begin or "/")]


def install(name: str, tell: Callable[[str], None]) -> None:
    """Install a runtime below `home`.

    Raises:
        UsageError: an unknown name.
        ExportError: it cannot be installed; the message is the installer's.
    """
    known = sorted({r.install for r in runtimes() if r.install})
    if name not in known and not name.startswith("1."):
        raise UsageError(
            f"--install must be one of {', '.join(known)} or a version of onnxruntime such as "
            f"1.23.2. Got {name!r}{nearest(name, known)}"
        )
    tell(f"installing {name} in {home()}")
    command = ["bash", str(RUNNERS / "install.sh"), str(home()), name]
    with_python = {**os.environ, "PYTHON": sys.executable}
    try:
        done = subprocess.run(command, env=with_python, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ExportError(f"{name} cannot be installed: {error}") from None
    if done.returncode:
        raise ExportError(f"{name} cannot be installed: {_last(done.stderr or done.stdout)}")


def run(there: Foreign, model: Path, job: Job) -> Result:
    """Run a job.

    Raises:
        ExportError: the runtime refuses the file, fails, crashes or takes too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, model, job)
        start(there, folder)
        return _read(folder)


def start(there: Foreign, folder: Path, program: str = "") -> None:
    """Run a runtime's program on a folder.

    Args:
        there: the runtime.
        folder: what the program reads, and where it leaves its result.
        program: another one of `runners/` than that of jobs, without its suffix.

    Raises:
        ExportError: it fails, crashes or takes too long.
    """
    (*before, path), after = there.command
    if program:
        path = str(RUNNERS / f"{program}{Path(path).suffix}")
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            [*before, path, str(folder), *after],
            env={**os.environ, **quiet},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"{there.name} does not run: {error}") from None
    if done.returncode < 0 or done.returncode > 128:
        raise ExportError(f"{there.name} crashed (exit code {done.returncode})")
    if done.returncode:
        raise ExportError(f"{there.name} refuses it: {_last(done.stderr)}")


def of_target(target: Target) -> Foreign:
    """An installed runtime of a kind of CPU.

    Raises:
        UsageError: none is installed; the message says which command installs one.
    """
    kind = [r for r in runtimes() if r.arithmetic and r.arithmetic == target.arithmetic]
    if not kind:
        raise UsageError(
            f"no reference knows the arithmetic of {target.name}. `mpq portability` runs a file "
            "there and compares the answers."
        )
    there = [r for r in kind if r.there]
    if not there:
        raise UsageError(
            f"no runtime of {target.name} is installed. Install one with: "
            f"mpq portability --install {kind[0].install}"
        )
    return next((r for r in there if r.name.endswith(USUAL)), there[0])


def answer(
    there: Foreign, model: Path | bytes, feeds: Mapping[str, Array]
) -> tuple[dict[str, Array], onnx.ModelProto, str]:
    """The outputs for one batch, the graph that ran, and the runtime's version.

    A runtime that does not tell its graph is taken to run the one that onnxruntime makes here.

    Raises:
        ExportError: as `run`.
    """
    with _file(model) as path:
        done = run(there, path, Job(feeds))
    if done.optimized is None:
        graph = runtime.optimized_model(model)
    else:
        graph = onnx.load_from_string(done.optimized)
    return dict(done.outputs), graph, done.version


def values(there: Foreign, model: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of a model that runs as it stands.

    Raises:
        ExportError: as `run`.
    """
    with _file(model) as path:
        return run(there, path, Job(feeds, optimize=False)).outputs


@contextmanager
def _file(model: Path | bytes) -> Iterator[Path]:
    """A model as a file."""
    if isinstance(model, Path):
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        yield path


def _write(folder: Path, model: Path, job: Job) -> None:
    feeds, offset = [], 0
    with (folder / "feeds.bin").open("wb") as out:
        for name, given in job.feeds.items():
            x = np.ascontiguousarray(given)
            offset += out.write(b"\0" * (-offset % 8))
            told = {"name": name, "type": str(x.dtype), "shape": list(x.shape)}
            feeds.append({**told, "count": x.size, "offset": offset})
            offset += out.write(x.tobytes())
    rows = max((len(x) for x in job.feeds.values() if x.ndim), default=1)
    settings = {"batch": job.batch, "one": job.one, "runs": job.runs, "optimize": job.optimize}
    content = {"model": str(model.resolve()), "feeds": feeds, "rows": rows, **settings}
    (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")


def _read(folder: Path) -> Result:
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    data, outputs, offset = (folder / "outputs.bin").read_bytes(), {}, 0
    for one in told["outputs"]:
        count = int(np.prod(one["shape"]))
        array = np.frombuffer(data, one["type"], count, offset)
        outputs[one["name"]] = array.reshape(one["shape"])
        offset += array.nbytes
    optimized = folder / "optimized.onnx"
    return Result(
        str(told["version"]),
        outputs,
        tuple(told["seconds"]),
        (told["integer"], told["layers"]) if "layers" in told else None,
        optimized.read_bytes() if optimized.is_file() else None,
    )


def _last(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it says nothing"
