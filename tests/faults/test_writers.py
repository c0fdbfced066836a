"""One writer at a time, and a stage's files together: whoever is killed, and when."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mpq import lock, rundir
from mpq.cli import main
from mpq.errors import UsageError
from mpq.files import write_text
from mpq.staging import together

HOLD = """
import sys, time
from pathlib import Path
from mpq import rundir
with rundir.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes into a run."""
    argv = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.mark.parametrize(
    "command",
    [
        "analyze model.pth -o r",
        "ptq --policy p.yaml -o r",
        "qat --policy p.yaml -o r",
        "export q.pth -o r",
        "rank resnet20 -o r",
        "profile model.pth -o r",
        "bench model.onnx -o r",
        "demo -o r",
        "train resnet20 -o r.pth",
    ],
)
def test_a_second_writer_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("version: 1\n")
    with rundir.held(Path("r")), rundir.held_file(Path("r.pth")):
        assert main(command.split()) == 2
        told = capsys.readouterr().err
    assert "is being written by `" in told
    assert f"process {os.getpid()}" in told
    assert ", since 20" in told
    assert not Path("r").exists()  # nothing was written, and nothing of the lock is left


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_ends_with_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "r"
    with holder(folder) as process:
        with pytest.raises(UsageError, match=f"process {process.pid} on .*, since 20"):
            rundir.held(folder).__enter__()
        process.send_signal(how)
        process.wait()
        assert (folder / ".lock").exists()  # it could not clean up
        with rundir.held(folder):
            assert json.loads((folder / ".lock").read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) in ([], [folder])


def test_a_lock_that_goes_while_it_is_opened_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, locked = tmp_path / ".lock", lock._locked
    seen: list[bool] = []

    def late(opened: object, path: Path) -> bool:
        if not seen:
            path.unlink()  # as its owner does, between our open and our flock
        seen.append(True)
        return locked(opened, path)  # type: ignore[arg-type]

    monkeypatch.setattr(lock, "_locked", late)
    with lock.held(file, tmp_path):
        assert file.exists()
    assert len(seen) == 2


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_there_is_a_word(
    number: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """File systems that know none, and (None) Windows."""

    def flock(*_: object) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    other = None if number is None else SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)
    monkeypatch.setattr(lock, "fcntl", other)
    with caplog.at_level(logging.WARNING, logger="mpq"), rundir.held(tmp_path / "r"):
        (tmp_path / "r" / "a").touch()
    assert "r: no locks here (" in caplog.text
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["a"]


def test_what_only_unix_has_is_not_needed_to_start() -> None:
    lacks = "import sys; sys.modules.update(fcntl=None, resource=None)"
    code = f"{lacks}; import mpq.lock, mpq.export.runtime; from mpq.cli import main; main(['-h'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "analyze" in done.stdout


def test_files_take_their_places_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "gone").write_text("old")

    def stage() -> None:
        with together(tmp_path) as aside:
            (aside / "a").write_text("new")
            (aside / "b").write_text("new")
            (aside / "gone").touch()
            assert (tmp_path / "a").read_text() == "old"

    def fails() -> None:
        with together(tmp_path) as aside:
            (aside / "a").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old", "gone": "old"}
    stage()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def killed_at(rename: int, work: Callable[[], object]) -> bool:
    """Whether a process that does this work is killed at that rename (there are so many)."""
    child = os.fork()
    if child == 0:
        left = [rename]

        def counted(function: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os._exit(137)  # as a kill: nothing is cleaned up
                return function(*args, **options)

            return call

        os.replace, os.rename, os.unlink = map(counted, (os.replace, os.rename, os.unlink))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 137


def test_a_kill_leaves_all_of_a_stage_or_nothing(tmp_path: Path) -> None:
    def stage() -> None:
        with rundir.held(folder), together(folder) as aside:
            for name in ("a", "b", "c"):
                write_text(aside / name, "new")
            (aside / "gone").touch()

    folder = tmp_path / "r"
    old, new = dict.fromkeys(("a", "b", "gone"), "old"), dict.fromkeys(("a", "b", "c"), "new")
    outcomes = []
    for rename in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in old.items():
            (folder / name).write_text(text)
        if not killed_at(rename, stage):
            break
        rundir.tidy(folder)  # the next command that reads
        seen = {p.name: p.read_text() for p in folder.iterdir() if p.name in {*old, *new}}
        assert seen in (old, new)
        outcomes.append(seen == new)
        with rundir.held(folder):  # the next that writes
            pass
        assert {p.name for p in folder.iterdir()} == set(seen)
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 8
    assert set(outcomes) == {False, True}


def test_the_next_command_removes_what_killed_ones_left(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    (folder / ".aside-x").mkdir(parents=True)
    (folder / ".aside-x" / "model.onnx").write_text("half")
    (folder / ".model.onnx.abc.mpq-part").write_text("half")
    (folder / ".mine.part").write_text("the user's own")
    with rundir.held(folder):
        pass
    assert [p.name for p in folder.iterdir()] == [".mine.part"]
