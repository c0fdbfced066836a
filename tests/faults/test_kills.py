"""Commands killed at their renames and writes, or with a disk that is full: the long form.

What a run holds afterwards, once the next command has looked into it, is all of a stage or nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpq import rundir
from mpq.cli import main

Tell = Callable[[str, str], None]

STAGES = {
    "analyze": ("analyze model.pth --num-score 16 -o r --force", "policy.yaml sensitivity.json"),
    "ptq": ("ptq --policy r --effort fast --num-calib 24 --force", "quantized.pth policy.yaml"),
    "export": (
        "export --onnx r --verify 20 --force",
        "model.onnx certificate.json verify.json float.onnx",
    ),
    "train": ("train resnet20 --data digits --epochs 1 --force -o model.pth", "model.pth"),
}
STEP = {"analyze": 3, "ptq": 1, "export": 1, "train": 3}
"""Of so many moments one is tried."""
pytestmark = pytest.mark.skipif("MPQ_FAULTS" not in os.environ, reason="of make test-faults")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the weights of one seed, and, as `model.pth`, those of another."""
    folder = tmp_path_factory.mktemp("project")
    before = Path.cwd()
    os.chdir(folder)
    train = "train resnet20 --data digits --epochs 1 --set batch=256 -o"
    try:
        assert main([*train.split(), "model.pth", "--seed", "1"]) == 0
        for stage in ("analyze", "ptq", "export"):
            assert main(STAGES[stage][0].split()) == 0
        assert main([*train.split(), "second.pth", "--seed", "2"]) == 0
        shutil.move("second.pth", "model.pth")
    finally:
        os.chdir(before)
    return folder


def started(work: Callable[[], int]) -> int:
    """The id of a process that does this; it exits with 99 for a traceback."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit code of a process, when it is over."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], int]) -> int:
    """The exit code of a process that does this; 99 for a traceback."""
    return ended(started(work))


def counted(function: Any, left: list[int], act: Callable[[], None]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return function(*args, **options)

    return call


def contents(stage: str) -> dict[str, bytes]:
    folder = Path() if stage == "train" else Path("r")
    paths = (folder / name for name in STAGES[stage][1].split())
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS: dict[str, tuple[tuple[str, ...], Callable[[], None]]] = {
    "killed at a rename": (("replace", "rename", "unlink"), lambda: os._exit(137)),
    "killed at a write": (("fsync",), lambda: os._exit(137)),
    "disk full at a write": (("fsync",), full),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_all_of_a_stage_or_nothing(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
    stage: str,
    fault: str,
) -> None:
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    for before in ("analyze", "ptq", "export"):
        if before == stage:
            break
        assert forked(lambda: main(STAGES[before][0].split())) == 0  # noqa: B023
    argv, old = STAGES[stage][0].split(), contents(stage)
    shutil.copytree(".", tmp_path / "kept")
    assert forked(lambda: main(argv)) == 0
    new = contents(stage)
    assert old != new
    names, act = FAULTS[fault]
    outcomes = []
    for moment in range(1, 60, STEP[stage]):
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(tmp_path / "kept", ".", dirs_exist_ok=True)
        left = [moment]

        def work() -> int:
            for name in names:
                setattr(os, name, counted(getattr(os, name), left, act))  # noqa: B023
            code = main(argv)
            return code if left[0] <= 0 else 42  # noqa: B023 - 42: there are not so many

        code = forked(work)
        assert code in (0, 2, 42, 137)
        if code == 42:
            break
        rundir.tidy(Path("r"))
        found = contents(stage)
        assert found in (old, new)
        outcomes.append(found == new)
        tell(f"{stage} {fault}", "survived")
    assert outcomes
    with rundir.held(Path("r")), rundir.held_file(Path("model.pth")):
        pass
    assert not list(Path("r").glob(".aside*")) + list(Path("r").glob(".*.mpq-part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["analyze", "ptq", "export"])
def test_signals_at_any_moment(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tell: Tell,
    stage: str,
    number: signal.Signals,
) -> None:
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    argv = STAGES[stage][0].split()

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return main(argv)

    start = time.monotonic()
    assert forked(work) == 0
    whole = time.monotonic() - start
    for part in range(1, 9):
        child = started(work)
        time.sleep(whole * part / 9)
        os.kill(child, number)
        code = ended(child)
        assert code in (0, 128 + number)
        tell(f"{number.name} at any moment", "survived")
