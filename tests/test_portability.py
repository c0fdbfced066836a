"""One file in several runtimes: jobs, rows, what is missing, what crashes.

`make test-portable` (MPQ_PORTABLE=1) installs and runs the real ones.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
from jsonkeys import documented, keys

import mpq
from mpq.cli import main
from mpq.errors import ExportError, UsageError
from mpq.export import float_to_onnx, foreign, to_onnx
from mpq.export.exact import verify_exact
from mpq.export.foreign import Foreign, Job
from mpq.export.portability import portability
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.report.tables import portability_table
from mpq.spec import weight_spec
from mpq.targets import get_target

EVERYWHERE = "onnxruntime-cpu,onnxruntime-arm64,onnxruntime-wasm,openvino-cpu"
HERE = foreign.runtimes()[0]
REAL = pytest.mark.skipif("MPQ_PORTABLE" not in os.environ, reason="`make test-portable` runs it")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual network with a 4-bit layer beside its float file."""
    folder = tmp_path_factory.mktemp("portable")
    graph = mpq.to_float(nets.build("residual"), nets.images())
    float_to_onnx(graph, folder / "float.onnx")
    narrow = LayerPolicy(name=list(graph.layers)[1], weight=weight_spec(4))
    prepared = mpq.prepare(graph, Policy(target=EVERYWHERE, layers=[narrow]))
    calibrate(prepared, nets.images(16), method="minmax")
    return to_onnx(prepared, folder / "net.onnx").path


def program(folder: Path, text: str) -> Foreign:
    """A runtime that is a program of this Python."""
    path = folder / "program.py"
    path.write_text(text)
    return Foreign("odd", None, ((sys.executable, str(path)), ()), "odd")


def test_the_runtime_of_this_python_is_a_row(file: Path):
    images = nets.images(40, seed=4).numpy()
    report = portability(
        file,
        images,
        labels=np.zeros(40, np.int64),
        float_file=file.parent / "float.onnx",
        runtimes=[HERE],
        runs=3,
    )
    (row,) = report.rows
    assert row.problem == ""
    assert (row.integer, row.layers) == (row.layers, 4)
    assert row.predicted == row.same_class == row.n == 40
    assert row.top1 is not None
    assert row.ms is not None
    assert row.ratio is not None
    assert json.loads(report.to_json())["rows"][0]["predicted"] == 40


def test_what_is_missing_crashes_or_refuses_is_named_and_the_others_run(file: Path, tmp_path: Path):
    missing = replace(HERE, name="absent", install="web", there=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    crash = program(tmp_path / "a", "import os; os.abort()")
    refusal = program(tmp_path / "b", "import sys; sys.exit('no such operator\\nINT2 is unknown')")
    there = [missing, crash, refusal, HERE]
    report = portability(file, nets.images(4).numpy(), runtimes=there, runs=0)
    rows, table = report.rows, portability_table(json.loads(report.to_json()))
    assert [row[-1] for row in table.rows][::3] == ["not installed", ""]
    assert table.note.endswith("; to install: mpq portability --install web")
    assert rows[0].problem == "not installed: mpq portability --install web"
    assert "odd crashed" in rows[1].problem
    assert "odd refuses it: INT2 is unknown" in rows[2].problem
    assert rows[3].n == rows[3].predicted == 4
    assert [row.n for row in rows[:3]] == [0, 0, 0]


def test_one_that_answers_otherwise_is_seen(file: Path, tmp_path: Path):
    text = Path(HERE.command[0][1]).read_text()
    negated = "    outputs = [-x for x in outputs]\n    seconds = []\n"
    wrong = program(tmp_path, text.replace("    seconds = []\n", negated))
    wrong = replace(wrong, arithmetic=HERE.arithmetic)
    (row,) = portability(file, nets.images(8, seed=5).numpy(), runtimes=[wrong], runs=0).rows
    assert (row.predicted, row.same_class) == (0, 0)


def test_a_job_takes_many_inputs_and_gives_all_outputs(file: Path):
    images = nets.images(5).numpy()
    name = foreign.runtime.model_input(foreign.runtime.session(file)).name
    whole = foreign.run(HERE, file, Job({name: images}))
    parts = foreign.run(HERE, file, Job({name: images}, batch=2))
    for key, x in whole.outputs.items():
        np.testing.assert_array_equal(x, parts.outputs[key])
    assert whole.optimized
    assert not foreign.run(HERE, file, Job({name: images}, optimize=False)).optimized


def test_node_by_node_in_another_process(file: Path):
    report = verify_exact(file, nets.images(4).numpy(), HERE)
    assert report.exact
    assert not report.unpredicted()


def test_names_of_runtimes():
    assert [r.name for r in foreign.chosen(("onnxruntime", "openvino"))] == [
        "onnxruntime",
        "openvino",
    ]
    assert len(foreign.chosen(("onnxruntime-arm64",))) == len(foreign.CPUS)
    assert foreign.chosen(()) == foreign.runtimes()
    with pytest.raises(UsageError, match=r"Got 'openvin0'; did you mean openvino"):
        foreign.chosen(("openvin0",))


def test_a_target_without_an_installed_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPQ_RUNTIMES", str(tmp_path))
    with pytest.raises(UsageError, match="Install one with: mpq portability --install arm64"):
        foreign.of_target(get_target("arm64"))
    with pytest.raises(UsageError, match="no reference knows the arithmetic of openvino-cpu"):
        foreign.of_target(get_target("openvino"))
    with pytest.raises(UsageError, match="--install must be one of arm64, node, openvino, web or"):
        foreign.install("cobol", print)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExportError, match="web cannot be installed"):
        foreign.install("web", print)


def test_the_command(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("MPQ_RUNTIMES", str(tmp_path))
    argv = ["portability", str(file), "--num-test", "4", "--data", "none"]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert keys(printed) == documented()["portability"]
    rows = {row["runtime"]: row for row in printed["rows"]}
    assert rows["onnxruntime"]["predicted"] == 4
    assert rows["onnxruntime"]["ratio"] is not None
    assert "--install arm64" in rows["onnxruntime-arm64 cortex-a76"]["problem"]
    assert main([*argv, "--runtime", "onnxruntime"]) == 0
    assert "4 of 4" in capsys.readouterr().out
    assert main([*argv, "--runtime", "nothing"]) == 2
    assert main(["portability", str(tmp_path / "gone.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_file_that_takes_no_images_is_run_on_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MPQ_RUNTIMES", str(tmp_path))
    text = """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 3, 2] x, int64[N, 2] ids) => (float[N, 3, 2] y, int64[N, 2] z) {
            a = Exp(x)
            b = Cast<to = 1>(ids)
            axes = Constant<value_ints = [1]>()
            c = Unsqueeze(b, axes)
            y = Add(a, c)
            z = Add(ids, ids) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "odd.onnx")
    argv = ["portability", str(tmp_path / "odd.onnx"), "--num-test", "5"]
    assert main([*argv, "--runtime", "onnxruntime", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["n"], row["predicted"], row["same_class"]) == (5, 5, None)
    assert row["sqnr_db"] == 999
    assert main([*argv, "--runtime", "onnxruntime", "--data", "cifar10"]) == 2


@REAL
def test_the_real_ones(file: Path):
    for name in ("web", "node", "openvino", "arm64"):
        if not all(r.there for r in foreign.runtimes() if r.install == name):
            try:
                foreign.install(name, print)
            except ExportError as error:  # no registry can be reached, say
                pytest.skip(str(error))
    images = nets.images(64, seed=6).numpy()
    rows = portability(file, images, runs=0).rows
    assert not [row.problem for row in rows if row.problem]
    for row in rows:
        assert row.predicted == (None if row.runtime == "openvino" else 64), row
        assert row.integer in (row.layers, None), row
        assert row.same_class is not None
        assert row.same_class >= (58 if row.runtime == "openvino" else 64), row


@REAL
@pytest.mark.parametrize("target", ["arm64", "wasm"])
def test_the_real_ones_node_by_node(file: Path, target: str):
    try:
        there = foreign.of_target(get_target(target))
    except UsageError as error:
        pytest.skip(str(error))
    report = verify_exact(file, nets.images(8, seed=7).numpy(), there)
    assert report.exact, report.differing()
