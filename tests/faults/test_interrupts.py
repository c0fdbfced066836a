"""Ctrl-C and SIGTERM end a command, whoever catches them on the way."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from mpq.cli import COMMANDS, Entry, main
from mpq.errors import ExportError
from mpq.staging import together

SIGNALS = pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)


def plain(number: int) -> None:
    os.kill(os.getpid(), number)


def as_an_error_of_ours(number: int) -> None:
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        raise ExportError("the export failed") from None


def as_another_error(number: int) -> None:
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        raise ImportError("cannot import name 'x' from partially initialized module") from None


def swallowed(number: int) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    with together(Path("r")) as aside:
        (aside / "model.onnx").write_text("of a command that was stopped")


@SIGNALS
@pytest.mark.parametrize("work", [plain, as_an_error_of_ours, as_another_error, swallowed])
def test_a_signal_ends_the_command(
    work: Callable[[int], None],
    number: int,
    code: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    @click.command()
    def probe() -> None:
        work(number)

    monkeypatch.setitem(COMMANDS, "probe", Entry(f"{__name__}:probe", "A probe."))
    monkeypatch.setattr("mpq.cli.load_command", lambda name: probe)
    before = signal.getsignal(number)
    if number == signal.SIGINT:  # a test run in the background ignores it
        monkeypatch.setattr(signal, "getsignal", lambda _: signal.default_int_handler)
    assert main(["probe"]) == code
    told = capsys.readouterr().err
    assert told.strip() == f"{word}; no file is half-written"
    assert not list(Path().rglob("model.onnx"))
    monkeypatch.undo()
    assert signal.getsignal(number) == before


def test_an_error_without_a_signal_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def probe() -> None:
        raise ImportError("a defect")

    monkeypatch.setitem(COMMANDS, "probe", Entry(f"{__name__}:probe", "A probe."))
    monkeypatch.setattr("mpq.cli.load_command", lambda name: probe)
    with pytest.raises(ImportError, match="a defect"):
        main(["probe"])
