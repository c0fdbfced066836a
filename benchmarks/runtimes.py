"""Old and new onnxruntimes in environments of their own: where exported files must run too.

`python benchmarks/runtimes.py [VERSION ...]` makes `build/runtimes/VERSION` for each (a virtual
environment with that onnxruntime and the numpy it wants); tests/test_forms.py runs every storage
form in each one that is there. `run_in` is how: the other interpreter loads the file at default
options, answers, and leaves the graph that it really runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent / "build" / "runtimes"
VERSIONS = ("1.18.1", "1.23.2")
"""The oldest that mpq writes for, and the first that takes INT4 through Cast."""
_PROGRAM = """
import sys
import numpy as np
import onnxruntime as ort
model, images, answer, optimized = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
options.optimized_model_filepath = optimized
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
np.save(answer, session.run(None, {session.get_inputs()[0].name: np.load(images)})[0])
"""


def interpreter(version: str) -> Path:
    """The Python of a version's environment, whether or not it exists."""
    return ROOT / version / "bin" / "python"


def installed() -> list[str]:
    """Versions whose environments are there."""
    return sorted(p.parent.parent.name for p in ROOT.glob("*/bin/python"))


def make(version: str) -> None:
    """Make the environment of a version; one that is there stays."""
    if interpreter(version).exists():
        return
    venv.create(ROOT / version, with_pip=True)
    numpy = "numpy<2" if tuple(map(int, version.split(".")[:2])) < (1, 19) else "numpy"
    install = ["-m", "pip", "install", "--quiet", f"onnxruntime=={version}", numpy]
    subprocess.run([str(interpreter(version)), *install], check=True)


def run_in(
    version: str, model: Path, images: NDArray[Any]
) -> tuple[NDArray[np.float32], Counter[str]]:
    """Answer of a model file in another runtime, and the operators that it really runs.

    Raises:
        RuntimeError: that runtime refuses the file; the message is its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer, graph = (Path(folder) / n for n in ("x.npy", "y.npy", "optimized.onnx"))
        np.save(given, images)
        command = [interpreter(version), "-c", _PROGRAM, model, given, answer, graph]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return np.load(answer), Counter(n.op_type for n in onnx.load(graph).graph.node)


def main() -> None:
    """Make the environments that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    for version in parser.parse_args().versions:
        print(f"onnxruntime {version}: {interpreter(version)}", flush=True)
        make(version)


if __name__ == "__main__":
    sys.exit(main())
