"""Every command killed, out of disk or told to stop at every moment in which it changes a file.

A command runs once. Before each rename, removal, new folder or write to disk, what lies there is
copied: that is what a kill at this moment leaves. Then a fork of the process meets a full disk
there, others a signal; what they leave is copied too, and the command goes on as if nothing had
been. Each copy must hold all files of the old state or all of the new one, once the next command
has looked into it, and none that is made from something else.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mpq import origins, rundir
from mpq.cli import main
from mpq.pipeline.analysis import SCHEMA

Tell = Callable[[str, str], None]
pytestmark = pytest.mark.skipif("MPQ_FAULTS" not in os.environ, reason="of make test-faults")
MINE = "--model mine:tiny --data mine:images"
FAST = "--num-calib 24 --force"


class Stage(NamedTuple):
    """A command, and the files that change together when it is done."""

    command: str
    files: str
    folder: str = "r"


STAGES = {
    "train": Stage(
        "train mine:tiny --data mine:images --seed 5 --epochs 2 --force -o model.pth",
        "model.pth",
        ".",
    ),
    "ensemble": Stage(
        "ensemble model.pth ens.pth -o ens.pth --force --data mine:images --trust-code mine:tiny",
        "ens.pth",
        ".",
    ),
    "rank": Stage(
        "rank model.pth --trust-code mine:tiny --data mine:images --effort fast -o r",
        "rank.json rank.png",
    ),
    "profile": Stage("profile model.pth --model mine:tiny -o r", "profile.json"),
    "analyze": Stage(
        f"analyze model.pth {MINE} --num-calib 24 --validate 2 -o r --force",
        "policy.yaml sensitivity.json sensitivity.png pareto.png validation.json validation.png",
    ),
    "ptq": Stage(f"ptq --policy p.yaml -o r --effort fast {FAST}", "ptq.pth policy.yaml"),
    "ptq best": Stage(
        f"ptq --policy p.yaml -o r --effort best --iterations 10 {FAST}",
        "ptq.pth policy.yaml",
    ),
    "qat": Stage(
        "qat --policy p.yaml -o r --epochs 2 --set batch=32 --force", "qat.pth policy.yaml"
    ),
    "export": Stage(
        "export r --num-test 5 --input uint8 --force",
        "model.onnx float.onnx certificate.json verify.json bench.jsonl",
    ),
    "verify": Stage("verify r --num-test 5", "verify.json"),
    "verify exact": Stage("verify r --exact", "exact.json"),
    "bench": Stage("bench r --runs 1", "bench.jsonl"),
    "report": Stage("report r", "report.html"),
}
WRITES = {"fsync", "mkdir"}
CHANGES = (*WRITES, "replace", "rename", "unlink", "remove", "rmdir")
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stop(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


FAULTS: dict[str, tuple[Callable[[], None], tuple[int, ...]]] = {
    "disk full": (full, (2, 0)),  # 0: what could not be written was a convenience
    "SIGINT": (stop(signal.SIGINT), (130,)),
    "SIGTERM": (stop(signal.SIGTERM), (143,)),
}


def copied(source: Path, place: Path) -> None:
    shutil.copytree(source, place, symlinks=True)


def restored(source: Path, place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)


class Watched:
    """What happens at each moment, in the process that runs the command."""

    def __init__(self, place: Path, out: Path) -> None:
        self.place, self.out, self.count, self.busy = place, out, 0, False

    def hooked(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            if not self.busy:
                self.busy = True
                self.moment(name)
                self.busy = False
            return function(*args, **options)

        return call

    def moment(self, name: str) -> None:
        kept = self.out / f"{self.count:03} killed 137"
        self.count += 1
        copied(self.place, kept)
        for fault, (act, _) in FAULTS.items():
            if fault == "disk full" and name not in WRITES:
                continue
            child = os.fork()
            if child == 0:
                act()
                return
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            copied(self.place, self.out / f"{self.count - 1:03} {fault} {code}")
            restored(kept, self.place)


def watched(work: Callable[[], int], place: Path, out: Path) -> int:
    """The exit code of a process that does this and is watched; 99 for a traceback."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            watch = Watched(place, out)
            for name in CHANGES:
                setattr(os, name, watch.hooked(name))
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(stage: Stage) -> dict[str, bytes]:
    paths = (Path(stage.folder, name) for name in stage.files.split())
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def contradicting(stage: Stage) -> list[str]:
    """What is said against the files of a stage by the notes of their run."""
    own = (name for name in stage.files.split() if name in origins.AGAIN)
    paths = [Path(stage.folder, name) for name in own if name != "policy.yaml"]  # the user's
    return [why for path in paths if path.is_file() and (why := origins.doubt(path))]


@pytest.fixture
def prepared(here: Path) -> Path:
    """The project, with a policy to come, and away from the user's own caches."""
    text = Path("r/policy.yaml").read_text().replace("int8/channel", "int6/channel", 1)
    Path("p.yaml").write_text(text)
    return here


@pytest.mark.parametrize("name", STAGES)
def test_all_of_a_stage_or_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell, name: str
) -> None:
    stage, out = STAGES[name], tmp_path / "moments"
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    out.mkdir()
    old = contents(stage)
    assert watched(lambda: main(stage.command.split()), prepared, out) == 0
    new = contents(stage)
    assert old != new
    assert not contradicting(stage)
    outcomes = []
    for moment in sorted(out.iterdir()):
        fault, _, code = moment.name[4:].rpartition(" ")
        assert fault == "killed" or int(code) in FAULTS[fault][1], moment.name
        monkeypatch.chdir(moment)
        rundir.tidy(Path(stage.folder))
        found = contents(stage)
        # One that went on to its end may have measured other times.
        assert found in (old, new) or (code == "0" and found.keys() == new.keys()), moment.name
        assert not contradicting(stage), moment.name
        if fault == "killed":
            outcomes.append(found == new)
        swept(stage)
        tell(f"{fault} at any change of a file", "survived")
        shutil.rmtree(moment)
    assert outcomes == sorted(outcomes)  # once new, it stays new
    assert not outcomes[0]


def swept(stage: Stage) -> None:
    """The next command that writes there removes what was left."""
    if stage.folder == ".":
        file = Path(stage.files)
        with rundir.held_file(file):
            pass
        left = [*Path().glob(f".{file.name}.*")]
    else:
        with rundir.held(Path(stage.folder)):
            pass
        hidden = (p for p in Path(stage.folder).iterdir() if p.name.startswith("."))
        left = [p for p in hidden if p.name != SCHEMA]  # which lies there for editors
    assert not left


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("name", ["train", "analyze", "ptq best", "qat", "export", "bench"])
def test_signals_at_any_moment(
    prepared: Path, tmp_path: Path, tell: Tell, name: str, number: signal.Signals
) -> None:
    """In the middle of the work too: within torch's exporter, the solver, the runtime."""
    stage, old = STAGES[name], contents(STAGES[name])
    copied(prepared, tmp_path / "kept")

    def begin() -> int:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                code = main(stage.command.split())
            finally:
                os._exit(code)
        return child

    start = time.monotonic()
    assert os.waitpid(begin(), 0)[1] == 0
    whole = time.monotonic() - start
    for part in range(1, 5):
        restored(tmp_path / "kept", prepared)
        child = begin()
        time.sleep(whole * part / 5)
        os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, STOPS[number])
        rundir.tidy(Path("r"))
        assert code == 0 or contents(stage) == old or not contradicting(stage)
        tell(f"{number.name} in the middle of the work", "survived")
