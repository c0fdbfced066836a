"""`mpq rank`: trained and given candidates, one table, one plot, resumption, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from jsonkeys import documented, keys
from rich.console import Console

from mpq.cli import main
from mpq.pipeline import ranking
from mpq.report.plots import png
from mpq.report.ranking import rank_plot, rank_table

QUICK = ("--data", "digits", "--epochs", "1", "--set", "batch=128", "--set", "lr=0.1")
FEW = ("--num-calib", "32", "--num-test", "100", "--effort", "fast")
ARGV = ["rank", "resnet8", "resnet8_conv", *QUICK, *FEW, "-o", "r"]


@pytest.fixture(scope="module")
def ranked(once) -> Path:
    """A folder in which `r` holds a ranking of two architectures."""

    def make(folder: Path) -> None:
        assert main(ARGV) == 0

    return once("ranked", make)


@pytest.fixture
def here(ranked, tmp_path, monkeypatch) -> Path:
    shutil.copytree(ranked, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def rows(path: str = "r/rank.json") -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(Path(path).read_text())["rows"]
    return found


def test_rows_say_what_precision_costs(here):
    assert {row["name"] for row in rows()} == {"resnet8", "resnet8_conv"}
    for row in rows():
        forms = row["forms"]
        assert forms["8"]["effective_bits"] == 8
        assert forms["4"]["effective_bits"] == 4
        assert 4 < forms["mixed"]["effective_bits"] <= 4.8
        assert forms["4"]["bytes"] < forms["mixed"]["bytes"] < forms["8"]["bytes"]
        assert forms["4"]["bitops"] < forms["mixed"]["bitops"] < forms["8"]["bitops"]
        assert forms["8"]["kl"] < forms["4"]["kl"]
        for form in forms.values():
            assert form["drop"] == pytest.approx(row["top1"] - form["top1"], abs=2e-3)
        saved = 8 - forms["mixed"]["effective_bits"]
        lost = forms["8"]["top1"] - forms["mixed"]["top1"]
        assert row["drop_per_bit"] == pytest.approx(lost / saved, abs=2e-3)
    assert [-row["forms"]["mixed"]["top1"] for row in rows()] == sorted(
        -row["forms"]["mixed"]["top1"] for row in rows()
    )
    assert Path("r/rank.png").read_bytes().startswith(b"\x89PNG")
    assert Path("r/resnet8.pth").is_file()


def test_a_finished_ranking_is_kept_and_a_new_candidate_added(here, monkeypatch, capsys):
    """A checkpoint trained before is a candidate like any other."""
    shutil.copy("r/resnet8_conv.pth", "own.pth")
    measured = []
    real = ranking.run_ptq

    def quantize(policy, subject, *args):
        measured.append(Path(subject.info.checkpoint).name)
        return real(policy, subject, *args)

    before = {row["name"]: row for row in rows()}
    monkeypatch.setattr(ranking, "run_ptq", quantize)
    argv = ["rank", "own.pth", "resnet8", *QUICK, *FEW, "-o", "r"]
    assert main([*argv, "--resume", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert keys(printed) == documented()["rank"]
    told = {row["name"]: row for row in printed["rows"]}
    assert set(measured) == {"own.pth"}
    assert told["resnet8"] == before["resnet8"]
    assert told["own.pth"]["forms"] == before["resnet8_conv"]["forms"]


def test_an_interrupted_ranking_goes_on(here, monkeypatch, capsys):
    real, calls = ranking.run_ptq, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    Path("r/rank.json").unlink()
    monkeypatch.setattr(ranking, "run_ptq", interrupted)
    monkeypatch.setattr(ranking, "run_train", lambda *args, **kwargs: None)  # trained already
    assert main(ARGV) == 130
    assert "mpq rank ... --resume goes on from what was saved" in capsys.readouterr().err
    assert [row["name"] for row in rows()] == ["resnet8"]
    monkeypatch.setattr(ranking, "run_ptq", real)
    assert main(ARGV) == 2
    assert "r holds a ranking. Go on with --resume" in capsys.readouterr().err
    assert main([*ARGV, "--resume"]) == 0
    assert len(rows()) == 2


def test_the_table_fits_80_columns(here):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(rank_table(rows()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "resnet8_conv" in text
    assert "per bit" in text


def test_the_plot_has_a_line_for_each_network(here, arranged):
    figure = rank_plot(rows())
    assert {text.get_text() for text in figure.axes[0].texts} == {"resnet8", "resnet8_conv"}
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("rank", "Missing argument 'ARCH...|CHECKPOINT...'"),
        ("rank resnet21 -o a", "resnet20"),
        ("rank none.pth -o a", "checkpoint none.pth does not exist"),
        ("rank resnet8 resnet8 -o a", "every candidate must be named once. Got resnet8 twice"),
        ("rank resnet8 -o r", "r holds a ranking"),
        ("rank resnet8 -o r --resume", "was measured with other settings (data, "),
        ("rank resnet8 -o a --effective-bits 4,5", "'4,5' is not a valid float"),
        ("rank resnet8 -o a --effective-bits 0", "must be a number above 0"),
        ("rank resnet8 -o a --set lr", "--set must be KEY=VALUE"),
        ("rank resnet8 -o a --data none", "--data must name images to measure on"),
    ],
)
def test_mistakes_end_with_2_and_write_nothing(here, capsys, argv, wanted):
    before = sorted(Path().rglob("*"))
    assert main(argv.split()) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before


def test_hints_and_help_name_options_that_there_are(here, capsys):
    torch.save({"conv.weight": torch.zeros(3, 3, 1, 1)}, "tiny.pth")
    assert main(["rank", "tiny.pth", "--data", "digits", "-o", "a"]) == 2
    told = capsys.readouterr().err
    assert "--model" not in told
    assert "Name a file of mpq train, which says what it is" in told
    assert main(["rank", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Mean bits per weight of the mixed policy. [default: 4.8]" in told
    assert "--epochs N Epochs of an architecture's training. [default: 10" in told
    assert "--bits" not in told
    assert main(["train", "resnet8", "--data", "digits", "--teacher", "tiny.pth"]) == 2
    assert "Name the network with --teacher-model NAME" in capsys.readouterr().err


def test_what_cannot_be_ranked_is_told_before_others_are_trained(here, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(ranking, "run_train", lambda *args, **kwargs: trained.append(args))
    Path("half.pth").write_bytes(Path("r/resnet8.pth").read_bytes()[:5000])
    argv = ["rank", "resnet8", "half.pth", *QUICK, *FEW, "-o", "new"]
    assert main(argv) == 2
    assert "half.pth" in capsys.readouterr().err
    argv = ["rank", "resnet8", *QUICK, *FEW, "-o", "new", "--effective-bits", "3"]
    assert main(argv) == 2
    assert "--effective-bits must be in 4..8. Got 3" in capsys.readouterr().err
    assert trained == []


def test_settings_stand_from_the_start(here, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ranking, "run_train", interrupted)
    argv = ["rank", "resnet8", *QUICK, *FEW, "-o", "new"]
    assert main(argv) == 130
    assert rows("new/rank.json") == []
    assert main([*argv, "--resume", "--seed", "5"]) == 2
    assert "was measured with other settings (seed)" in capsys.readouterr().err
