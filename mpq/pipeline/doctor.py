"""`doctor`: what this computer has, what it will run as integers, and what is missing for what."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

from packaging.requirements import Requirement

from mpq import __version__, threads
from mpq.cpu import this_cpu
from mpq.data.cache import cache_folder
from mpq.data.catalog import open_data, search_places
from mpq.errors import DataError
from mpq.target import SATURATION
from mpq.targets import this_target

DISTRIBUTION = "mpq-compiler"
"""What pip calls this package: on PyPI `mpq` is another project."""
PURPOSE = {
    "torch": "every command that opens a network",
    "torchvision": "checkpoints of torchvision's architectures",
    "onnx": "export, verify, certify, profile, bench --peers",
    "onnx-ir": "export, verify, profile",
    "onnxscript": "export, verify, profile",
    "onnxruntime": "export, verify, certify, profile, bench",
    "scipy": "analyze, rank",
    "accelerate": "train, qat, and several processes",
    "matplotlib": "analyze, rank",
    "bokeh": "report",
    "jinja2": "report",
    "scikit-learn": "demo, --data digits",
    "pillow": "--data with image files",
}
"""Distributions, and the commands that cannot do without; without the others none starts."""
MODULES = {"onnx-ir": "onnx_ir", "scikit-learn": "sklearn", "pillow": "PIL"}
"""Modules that are not called as their distribution is."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16", "asimddp")
"""Instructions that decide how fast integers are."""
NAMED_DATA = ("cifar10", "cifar100")


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that is not there: what, for which commands, and what brings it."""

    what: str
    needed_for: str
    mend: str


@dataclass(frozen=True)
class Health:
    """What `mpq doctor` finds.

    Args:
        mpq: its version.
        python: its version, and the system.
        versions: of the packages that mpq uses; None where one is not installed.
        cpu: its name.
        flags: those of `FLAGS` that it has.
        target: what `--target` means here.
        integers: what onnxruntime runs as integers on this CPU.
        gpu: the CUDA device that `--device cuda` takes; None without one.
        threads: `cpus` of the computer, `allowed` by affinity and quota, and what the environment
            says to OpenMP.
        data: where data are looked for, and named data sets that were found there.
        cache: where what is kept for the next time lies.
        missing: what commands may ask for and not find.
    """

    mpq: str
    python: str
    versions: dict[str, str | None]
    cpu: str
    flags: tuple[str, ...]
    target: str
    integers: str
    gpu: str | None
    threads: dict[str, str | int | None]
    data: dict[str, list[str]]
    cache: str
    missing: tuple[Missing, ...]

    def to_json(self) -> dict[str, object]:
        """The values of a JSON object."""
        return asdict(self)


def examine() -> Health:
    """Look at this computer. Nothing is written, and what does not load is reported, not raised."""
    cpu, requirements = this_cpu(), _requirements()
    gpu = _gpu()
    places = search_places(None)
    found = [name for name in NAMED_DATA if _opens(name)]
    return Health(
        mpq=__version__,
        python=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        versions={name: _version(name) for name in requirements},
        cpu=cpu.name,
        flags=tuple(flag for flag in FLAGS if flag in cpu.flags),
        target=this_target().name,
        integers=_integers(),
        gpu=gpu,
        threads={
            "cpus": os.cpu_count(),
            "allowed": threads.allowed(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        },
        data={"places": [str(place) for place in places], "found": ["digits", *found]},
        cache=str(cache_folder()),
        missing=(*_broken(requirements), *_tools(gpu), *_data(found)),
    )


def _requirements() -> dict[str, Requirement]:
    """What mpq asks for, by name; the names alone where it runs without having been installed."""
    try:
        asked = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        asked = [Requirement(name) for name in PURPOSE]
    return {one.name: one for one in asked if one.marker is None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _broken(requirements: dict[str, Requirement]) -> Iterator[Missing]:
    """Packages that are absent, of another version than asked for, or do not load."""
    for name, asked in requirements.items():
        purpose, mend = PURPOSE.get(name, "every command"), f'pip install "{asked}"'
        version = _version(name)
        if version is None:
            yield Missing(name, purpose, mend)
        elif not asked.specifier.contains(version, prereleases=True):
            yield Missing(f"{name}{asked.specifier} (here: {version})", purpose, mend)
        elif (error := _load_error(MODULES.get(name, name))) is not None:
            yield Missing(f"{name} that loads ({error})", purpose, f"{mend} --force-reinstall")


def _load_error(module: str) -> str | None:
    """Why a module does not load; only those whose binaries often fail are tried."""
    if module not in ("torch", "onnxruntime"):
        return None
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary raises what it likes
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _gpu() -> str | None:
    if _load_error("torch") is not None:
        return None
    torch = sys.modules["torch"]
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def _tools(gpu: str | None) -> Iterator[Missing]:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        yield Missing("a C++ compiler", "train and qat with --compile", "apt install g++")
    if gpu is None:
        yield Missing(
            "a CUDA device", "--device cuda (all commands run on the CPU)", "a torch built for CUDA"
        )


def _data(found: list[str]) -> Iterator[Missing]:
    for name in NAMED_DATA:
        if name not in found:
            yield Missing(
                f"the data {name}", f"--data {name}", "export MPQ_DATA=FOLDER, or --data-root"
            )


def _opens(name: str) -> bool:
    try:
        open_data(name)
    except DataError:
        return False
    return True


def _integers() -> str:
    """What the target of this computer does, as a sentence."""
    target = this_target()
    note = f"; {SATURATION}" if target.saturates else ""
    return (
        f"convolutions and linear layers whose weights and activations have at most "
        f"{target.integer_bits} bits{note}"
    )
