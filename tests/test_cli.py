from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from mpq import files, rundir
from mpq.cli import COMMANDS, Entry, main, terminal
from mpq.errors import UsageError
from mpq.export.meta import KEY, to_metadata
from mpq.policy import DataInfo, ModelInfo, Policy

MPQ = [sys.executable, "-c", "import sys; from mpq.cli import main; sys.exit(main())"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(here, monkeypatch):
    """Make `mpq probe` run the given lines."""

    def make(*lines):
        body = "".join(f"    {line}\n" for line in lines)
        text = f"import click\n@click.command()\ndef probe():\n    'x'\n{body}"
        (here / "probe_command.py").write_text(text)
        monkeypatch.syspath_prepend(here)
        monkeypatch.delitem(sys.modules, "probe_command", raising=False)
        monkeypatch.setitem(COMMANDS, "probe", Entry("probe_command:probe", "A probe."))

    return make


def write_digits_model(path, policy=None):
    """Ten linear classes over 16x16 RGB images, seeded."""
    w = np.random.default_rng(0).standard_normal((768, 10), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if policy:
        helper.set_model_props(model, {KEY: to_metadata(policy)})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


POLICY = Policy(
    model=ModelInfo(arch="linear", classes=10, input=(3, 16, 16), normalize="none"),
    data=DataInfo(name="digits"),
)


def test_help_lists_every_command_and_imports_none(capsys):
    code = (
        "import sys; from mpq.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'mpq.cli.bench'} & set(sys.modules);"
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for name, entry in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.help)}$", done.stdout, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"mpq \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["bnch"], "did you mean bench"),
        (["bench", "--runz", "3"], "--runs"),
        (["bench", "--batch", "0"], "--batch"),
        (["bench", "--normalize", "imagnet", "x.onnx"], "did you mean imagenet"),
        (["bench", "absent.onnx"], "error: absent.onnx does not exist. Name an ONNX file"),
        (["bench"], "no run under runs/ holds a model.onnx. Run `mpq export` first"),
        (["train", "resnet8", "-o", "m.onnx"], "must end in .pth, .pt, .ckpt. Got m.onnx"),
        (["ensemble", "a.pth", "-o", "e.yaml"], "Got e.yaml. Try e.pth."),
        (["report"], "Run `mpq analyze MODEL.pth` first"),
        (["report", "absent"], "error: run folder absent does not exist"),
    ],
)
def test_mistakes_end_with_2_and_one_message(here, capsys, argv, told):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert told in err
    assert "Traceback" not in err
    assert out == ""
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("argv", ["verify", "verify --exact", "certify", "bench", "portability"])
def test_a_checkpoint_is_no_onnx_file(here, capsys, argv):
    torch.save({"a": torch.zeros(2)}, "tiny.pth")
    assert main([*argv.split(), "tiny.pth"]) == 2
    assert "tiny.pth must be an ONNX file. Got a checkpoint of torch" in capsys.readouterr().err


def test_an_error_of_ours_is_one_message(command, capsys):
    command("from mpq.errors import PolicyError", "raise PolicyError('no such layer')")
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == "error: no such layer\n"


def test_messages_are_folded_on_a_terminal_and_whole_in_a_pipe(command, capsys, monkeypatch):
    told = "one " * 18 + "`mpq analyze model.pth` does it"
    command("from mpq.errors import PolicyError", f"raise PolicyError({told!r})")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["probe"]) == 2
    folded = "error: " + "one " * 18  # a command is not broken, so that it can be copied
    assert capsys.readouterr().err == f"{folded.rstrip()}\n`mpq analyze model.pth` does it\n"


def test_notes_stand_above_the_bars_of_progress(capsys, monkeypatch):
    terminal_of_80 = Console(stderr=True, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "stderr", terminal_of_80)
    with terminal.bars() as tell:
        tell("scoring", 1, 2)
        note = logging.makeLogRecord({"msg": "%s is not \x07 kept", "args": ("this",)})
        terminal.Notes().emit(note)
    lines = re.split(r"\r|\n|\x1b\[[^A-Za-z]*[A-Za-z]", capsys.readouterr().err)
    assert r"note: this is not \x07 kept" in lines


def test_what_the_system_refuses_is_one_message(command, capsys):
    command(f"raise OSError({errno.ENOSPC}, 'No space left on device', 'runs/a/model.onnx')")
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == "error: runs/a/model.onnx: No space left on device\n"


def test_a_defect_keeps_its_traceback(command):
    command("raise ZeroDivisionError('a defect')")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        main(["probe"])


def test_a_missing_package_is_named(command, capsys):
    command("pass")
    COMMANDS["probe"] = Entry("no_such_package.probe:probe", "A probe.")
    assert main(["probe"]) == 2
    assert "mpq probe needs no_such_package, which is not installed" in capsys.readouterr().err


def test_interruption_ends_with_130(here):
    (here / "slow.py").write_text(
        "import click, time\n@click.command()\ndef slow():\n    print('on', flush=True)\n"
        "    time.sleep(60)\n"
    )
    code = (
        "import sys; from mpq import cli; cli.COMMANDS['slow'] = cli.Entry('slow:slow', '');"
        "sys.exit(cli.main(['slow']))"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=pipe,
        stderr=pipe,
        text=True,
        # A test run in the background hands on that it ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stdout.readline() == "on\n"
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 130
    assert err.strip().startswith("interrupted; ")
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(here):
    write_digits_model(here / "m.onnx")
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*MPQ, "bench", "m.onnx", "--data", "none", "--runs", "1", "--json"]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "data: none\n"


def test_bench_writes_what_it_prints(here, capsys):
    run = here / "runs" / "a"
    model = write_digits_model(run / "model.onnx", POLICY)
    write_digits_model(run / "float.onnx")
    (run / "policy.yaml").write_text(POLICY.to_yaml())
    rundir.touch_run(run)
    assert main(["bench", "--json", "--runs", "2", "--num-test", "50"]) == 0
    out, err = capsys.readouterr()
    assert "no file named: using runs/a/model.onnx" in err
    rows = [json.loads(line) for line in (run / "bench.jsonl").read_text().splitlines()]
    assert json.loads(out) == {"rows": rows}
    assert [r["file"] for r in rows] == ["runs/a/float.onnx", "runs/a/model.onnx"]
    assert rows[1]["bytes"] == model.stat().st_size
    assert rows[0]["top1"] == rows[1]["top1"] > 0
    assert rows[1]["n"] == 50


def test_bench_prints_a_table_that_fits(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-rather-long-name-of-a-model-file-that-needs-folding.onnx"
    write_digits_model(here / name, POLICY)
    assert main(["bench", name, "--runs", "2", "--num-test", "20"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "top-1 in percent of 20 images" in out
    assert not (here / "bench.jsonl").exists()  # not a run


def test_bench_compares_with_the_runtimes_own_int8(here, capsys):
    path = write_digits_model(here / "float.onnx", POLICY)
    argv = ["bench", str(path), "--float", str(path), "--peers", "--runs", "2", "--json"]
    assert main([*argv, "-o", "out"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [os.path.basename(r["file"]) for r in rows] == [
        "float.onnx",
        "ort-static.onnx",
        "ort-dynamic.onnx",
    ]
    assert (here / "out" / "bench.jsonl").is_file()


def test_bench_wants_to_know_the_data(here, capsys):
    write_digits_model(here / "m.onnx")
    assert main(["bench", "m.onnx"]) == 2
    assert "Name it with --data NAME" in capsys.readouterr().err


def test_report_names_the_page(here, capsys):
    run = here / "runs" / "a"
    run.mkdir(parents=True)
    (run / "policy.yaml").write_text("version: 1\n")
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": "runs/a/report.html"}
    assert "<title>a - mpq</title>" in (run / "report.html").read_text()


def test_the_newest_run_is_the_one_used_last(here):
    for age, name in ((0, "a"), (-100, "b"), (-50, "c")):
        write_digits_model(here / "runs" / name / "model.onnx")
        stamp = time.time() + age
        os.utime(here / "runs" / name / "model.onnx", (stamp, stamp))
    assert rundir.newest_run("model.onnx").name == "a"
    rundir.touch_run(rundir.resolve_out(None, "b"))
    assert rundir.newest_run("model.onnx").name == "b"
    outside = rundir.touch_run(here / "elsewhere" / "d")
    assert rundir.newest_run("model.onnx").name == "b"  # d has none
    write_digits_model(outside / "model.onnx")
    assert rundir.newest_run("model.onnx").resolve() == outside.resolve()


def test_the_pointer_survives_a_move_of_the_project(here, monkeypatch):
    write_digits_model(here / "p" / "runs" / "a" / "model.onnx")
    write_digits_model(here / "p" / "runs" / "b" / "model.onnx")
    monkeypatch.chdir(here / "p")
    rundir.touch_run(rundir.resolve_out(None, "a"))
    monkeypatch.chdir(here)
    (here / "p").rename(here / "q")
    monkeypatch.chdir(here / "q")
    assert rundir.newest_run("model.onnx").name == "a"


def test_a_run_is_not_overwritten_unasked(here):
    path = here / "policy.yaml"
    rundir.refuse_overwrite(path, force=False)
    path.write_text("x")
    rundir.refuse_overwrite(path, force=True)
    with pytest.raises(UsageError, match=r"exists already.*--force.*-o"):
        rundir.refuse_overwrite(path, force=False)
    with pytest.raises(UsageError, match=r"policy\.yaml is a file"):
        rundir.resolve_out(path, "a")
    with pytest.raises(
        UsageError, match=r"Got a/model\.onnx, the name of a file. Try -o a/model\."
    ):
        rundir.resolve_out("a/model.onnx", "a")
    with pytest.raises(UsageError, match=r"policy\.yaml/x/a cannot be written: .*Not a directory"):
        rundir.refuse_overwrite(path / "x" / "a", force=True)
    with pytest.raises(UsageError, match=r"must be a file to write\. Got a folder"):
        rundir.refuse_overwrite(here, force=True)


def test_a_file_is_written_whole_or_not_at_all(here):
    path = here / "a" / "x.json"
    files.write_json(path, {"b": [1, None]})
    assert json.loads(path.read_text()) == {"b": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, float("nan"))
    (here / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        files.write_text(here / "folder", "text")
    assert json.loads(path.read_text()) == {"b": [1, None]}
    assert sorted(p.name for p in here.rglob("*")) == ["a", "folder", "x.json"]
