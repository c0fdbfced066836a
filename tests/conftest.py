"""What every test obeys: one thread per worker, and no state left behind for the next test."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers such as nets.py, in every import mode

try:
    import fcntl
except ImportError:  # Windows: there each worker makes its own
    fcntl = None

torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the first command in a process would
# The key that seals what a run has been trusted with is the user's own: tests have another.
os.environ["XDG_STATE_HOME"] = str(Path(tempfile.gettempdir()) / "mpq-tests")
OTHERS = (
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
)
"""Variables that pytest, torch and scikit-learn set on their own account."""


def pytest_collection_finish() -> None:
    """Spare what takes time in many tests and is looked at in few."""
    _look_up_translations_once()
    _leave_pictures_unarranged()
    gc.freeze()  # a million objects of what is imported stay: no collection looks at them again


def _leave_pictures_unarranged() -> None:
    """Arranging its parts is most of the time of a picture; `arranged` has them as users do."""
    if "mpq.report.plots" in sys.modules:
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        _arrange.append(ConstrainedLayoutEngine.execute)
        ConstrainedLayoutEngine.execute = lambda self, figure: None


_arrange: list[Callable[..., Any]] = []


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn as users have them."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    for arrange in _arrange:
        monkeypatch.setattr(ConstrainedLayoutEngine, "execute", arrange)


def _look_up_translations_once() -> None:
    """Let torch look up its translations to ONNX once, not for each export: half of a small one.

    Where a later torch has them elsewhere, the tests take longer and nothing else.
    """
    if "onnxscript" not in sys.modules:
        return
    with contextlib.suppress(ImportError, AttributeError):
        from torch._export import utils
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        lookup = functools.cache(ONNXRegistry.from_torchlib)

        def from_torchlib(*args: Any, **options: Any) -> ONNXRegistry:
            found = copy.copy(lookup(*args, **options))
            found.functions = {target: list(known) for target, known in found.functions.items()}
            return found  # an export adds translations of its own

        ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
        namespace = utils._collect_all_valid_cia_ops_for_namespace
        utils._collect_all_valid_cia_ops_for_namespace = functools.cache(namespace)


def _state() -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k not in OTHERS}
    return {
        "default dtype": torch.get_default_dtype(),
        "thread count": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "environment": env,
    }


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves torch or the environment changed, and mend it for the next one."""
    before = _state()
    yield
    after = _state()
    leaked = [name for name in before if before[name] != after[name]]
    if not leaked:
        return
    torch.set_default_dtype(before["default dtype"])
    torch.set_num_threads(before["thread count"])
    torch.set_grad_enabled(before["grad mode"])
    for key in after["environment"].keys() - before["environment"].keys():
        del os.environ[key]
    os.environ.update(before["environment"])
    changes = "; ".join(_change(name, before[name], after[name]) for name in leaked)
    pytest.fail(f"the test leaves changed state behind: {changes}", pytrace=False)


def _change(name: str, before: object, after: object) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
        return f"{name}: {', '.join(sorted(keys))}"
    return f"{name}: {before} -> {after}"


Once = Callable[[str, Callable[[Path], None]], Path]
"""`once(name, make)`: the folder of that name, which `make` filled, in itself as working folder."""


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Folders that are dear to make are made once for all workers, which then only read them.

    The first to ask makes it in its place and marks it as whole; another waits for that.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if fcntl and "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        place, whole = root / name, root / f"{name}.whole"
        with (root / f"{name}.lock").open("w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                with pytest.MonkeyPatch.context() as patch:
                    patch.chdir(place)
                    make(place)
                whole.touch()
        return place

    return folder


@pytest.fixture(scope="session")
def two_processes(once: Once) -> Path:
    """What two processes wrote of all that `processes.py` has: their start is most of the time."""
    launch = (
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    )  # fmt: skip
    script = str(Path(__file__).parent / "processes.py")

    def make(folder: Path) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "MPQ_CACHE": str(folder / "cache")}
        env.pop("MPQ_DATA", None)
        done = subprocess.run(
            [*launch, script], capture_output=True, text=True, env=env, cwd=folder, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (folder / "stdout.txt").write_text(done.stdout)
        (folder / "stderr.txt").write_text(done.stderr)

    return once("two-processes", make)


@pytest.fixture(scope="session")
def mpq_data() -> Path:
    """The folder of real data; relative values are relative to where pytest was started."""
    value = os.environ.get("MPQ_DATA")
    if not value:
        pytest.skip("MPQ_DATA is not set, so there are no real data to test with")
    path = Path(value).resolve()
    if not path.is_dir():
        pytest.skip(f"MPQ_DATA={value} is not a folder")
    return path
