from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mpq.errors import PolicyError, UsageError
from mpq.policy import Policy
from mpq.report import plots, tables
from mpq.report.grid import Grid, columns, short, tiny
from mpq.report.page import page, write_page

NAMES = ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2) for b in (0, 1) for c in (1, 2))]
NAMES += ["blocks[0].<odd>", "linear"]


def sensitivity():
    layers = [{"name": n, "kind": "conv", "params": 10_000, "macs": 2_500_000} for n in NAMES]
    rows = [
        {"layer": n, "part": part, "bits": bits, "score": (i + 1) * 4.0**-bits, "sqnr": 6.0 * bits}
        for i, n in enumerate(NAMES)
        for part, bits in (("weight", 8), ("weight", 4), ("activation", 8))
    ]
    rows[0]["score"] = 0.0
    front = [
        {
            "effective_bits": 8 - 4 * k / len(NAMES),
            "predicted_drop": 0.01 * 2.0**k,
            "bitops": 1e9,
            "bytes": 200_000 - 9_000 * k,
            "widths": {n: [4 if i < k else 8, 8] for i, n in enumerate(NAMES)},
        }
        for k in range(len(NAMES) + 1)
    ]
    told = {"metric": "fisher", "samples": 512, "seed": 0, "key": "ab"}
    return {**told, "layers": layers, "rows": rows, "front": front, "chosen": front[5]["widths"]}


def certificate():
    keys = ("name", "asked", "stored", "executed", "reason")
    rows = [
        ("conv1", "W4A8", "int4", "QLinearConv", ""),
        ("linear", "W16A16", "int16", "Gemm", "x"),
    ]
    layers = [dict(zip(keys, row, strict=True)) for row in rows]
    return {"integer_macs_fraction": 0.983, "boundaries": 2, "layers": layers}


def verify():
    exact = {"name": "conv1", "sqnr_db": 999.0, "max_step": 0, "equal_fraction": 1.0}
    near = {"name": "linear", "sqnr_db": 61.26, "max_step": 3, "equal_fraction": 0.9997}
    near["own_step"] = 1
    return {"top1_agreement": 0.9995, "max_step": 1, "n": 1000, "layers": [exact, near]}


def bench_rows():
    times = {"median": 0.5, "p10": 0.4, "p90": 0.6}
    common = {"n": 10_000, "latency_ms": times, "threads": 1, "batch": 1, "peak_mb": 61.4}
    first = {"file": "runs/a/float.onnx", "bytes": 1_000_000, "top1": 91.73, "ratio_to_float": 1.0}
    second = {"file": "runs/a/model.onnx", "bytes": 160_000, "top1": 91.5, "ratio_to_float": 2.11}
    return [{**first, **common}, {**second, **common}]


def metrics():
    return [
        {"epoch": e, "train_loss": 1 / e, "val_top1": 80.0 + e, "lr": 0.1 / e, "note": "text"}
        for e in range(1, 6)
    ]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a<b"
    folder.mkdir()
    (folder / "policy.yaml").write_text(Policy.uniform(8).to_yaml())
    for name, value in (("sensitivity", sensitivity()), ("certificate", certificate())):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "verify.json").write_text(json.dumps(verify()))
    for name, rows in (("bench", bench_rows()), ("metrics", metrics())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def rendered(grid, width=80):
    console = Console(width=width, file=io.StringIO())
    console.print(grid)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "grid",
    [
        tables.bench_table(bench_rows()),
        tables.sensitivity_table(sensitivity()),
        tables.configurations_table(sensitivity()),
        tables.certificate_table(certificate()),
        tables.verify_table(verify()),
    ],
    ids=lambda g: g.title,
)
def test_tables_fit_80_columns_and_hide_no_row(grid):
    text = rendered(grid)
    assert max(map(len, text.splitlines())) <= 80
    for row in grid.rows:
        assert row[0] in text


def test_sensitivity_table_tells_scores_and_decision():
    grid = tables.sensitivity_table(sensitivity())
    assert [c.title for c in grid.columns] == [
        *("layer", "kind", "params", "MACs"),
        *("W8", "W4", "A8", "bits"),
    ]
    assert grid.rows[1] == (
        "layer1.0.conv1",
        "conv",
        "10k",
        "2.5M",
        "3.1e-5",
        "7.8e-3",
        "3.1e-5",
        "W4A8",
    )
    assert grid.rows[0][4] == "0"
    assert grid.rows[-1][-1] == "W8A8"


def test_configurations_table_is_thinned_but_keeps_the_chosen_one():
    grid = tables.configurations_table(sensitivity(), limit=3)
    assert [row[-1] for row in grid.rows].count("chosen") == 1
    (marked,) = grid.marked
    assert grid.rows[marked][-1] == "chosen"
    assert grid.rows[marked][4:6] == (str(len(NAMES) - 5), "5")
    assert len(grid.rows) in (3, 4)


def test_bench_table_without_accuracy_or_float():
    row = bench_rows()[1] | {"top1": None, "n": 0, "ratio_to_float": None, "peak_mb": None}
    grid = tables.bench_table([row])
    assert grid.rows[0][2] == grid.rows[0][5] == grid.rows[0][6] == "-"
    assert "top-1" not in grid.note


def test_verify_table_calls_no_difference_exact():
    rows = tables.verify_table(verify()).rows
    assert rows == (
        ("conv1", "exact", "-", "0", "100.000%"),  # written before layers were judged alone
        ("linear", "61.3", "1", "3", "99.970%"),
    )


def test_narrow_terminals_lose_spare_columns_first():
    wide = Grid("t", columns("name", "?kind", "#value"), (("a" * 20, "b" * 20, "1" * 20),))
    assert "kind" in rendered(wide, 80)
    assert "kind" not in rendered(wide, 50)
    assert "1" * 20 in rendered(wide, 50)


def test_grid_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match=r"table 't' must have 2 texts\. Row 0 has 1"):
        Grid("t", columns("a", "b"), (("x",),))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0, "0"), (512, "512"), (18432, "18.4k"), (1.6e9, "1.6G")]
)
def test_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (1.234e-4, "1.2e-4"), (0.0312, "0.0312")]
)
def test_tiny(value, text):
    assert tiny(value) == text


@pytest.mark.parametrize(
    "figure",
    [
        plots.sensitivity_plot(sensitivity()),
        plots.pareto_plot(sensitivity()),
        plots.curves_plot(metrics()),
    ],
)
def test_plots_are_pictures_with_something_on_them(figure):
    picture = np.asarray(Image.open(io.BytesIO(plots.png(figure))).convert("L"))
    assert min(picture.shape) > 300
    assert 0.01 < (picture < 250).mean() < 0.5
    edge = np.concatenate([picture[:3].ravel(), picture[:, -2:].ravel()])
    assert edge.min() > 250  # nothing is cut off


def test_sensitivity_plot_rings_the_decided_width_of_each_layer():
    data = sensitivity()
    axis = plots.sensitivity_plot(data).axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == NAMES
    (rings,) = [c for c in axis.collections if c.get_label() == "decided"]
    scores = {(r["layer"], r["bits"]): r["score"] for r in data["rows"] if r["part"] == "weight"}
    spots = {round(y): x for x, y in rings.get_offsets()}
    for i, name in enumerate(NAMES[1:], 1):
        assert spots[i] == scores[name, data["chosen"][name][0]]
    assert axis.get_xscale() == "log"


def test_pareto_plot_marks_the_chosen_configuration():
    data = sensitivity()
    axis = plots.pareto_plot(data).axes[0]
    (star,) = [line for line in axis.lines if line.get_label().startswith("chosen: 6.18 bits")]
    chosen = data["front"][5]
    assert star.get_xdata() == [chosen["effective_bits"]]
    assert star.get_ydata() == [chosen["predicted_drop"]]


def test_a_front_over_another_limit_and_several_choices():
    data = sensitivity() | {"sweep": "max_size_mb"}
    data["choices"] = [
        {"file": name, "widths": data["front"][k]["widths"]}
        for name, k in (("policy.yaml", 5), ("policy-7.yaml", 2))
    ]
    axis = plots.pareto_plot(data).axes[0]
    assert axis.get_xlabel() == "bytes of the file, MB"
    stars = {line.get_label().partition(":")[0]: line.get_xdata() for line in axis.lines[1:]}
    assert stars["policy.yaml"] == [data["front"][5]["bytes"] / 1e6]
    assert stars["policy-7.yaml"] == [data["front"][2]["bytes"] / 1e6]
    grid = tables.configurations_table(data, limit=3)
    assert {row[-1] for row in grid.rows} >= {"policy.yaml", "policy-7.yaml"}
    assert len(grid.marked) == 2


def test_validation_is_shown_with_its_correlation():
    policies = [
        {"effective_bits": 4 + k, "predicted": 0.1 / (k + 1), "kl": 0.2 / (k + 1), "loss": None,
         "top1": None}
        for k in range(4)
    ]  # fmt: skip
    data = {"metric": "fisher", "images": 10, "rho": 1.0, "rho_loss": None, "policies": policies}
    axis = plots.validation_plot(data).axes[0]
    assert axis.get_title() == "fisher: Spearman's rho 1.000"
    spots = axis.collections[0].get_offsets()
    assert sorted(map(tuple, spots)) == sorted((p["predicted"], p["kl"]) for p in policies)
    grid = tables.validation_table(data)
    assert [row[0] for row in grid.rows] == ["7.00", "6.00", "5.00", "4.00"]
    assert "rho of prediction and divergence 1.000" in grid.note


def test_curves_skip_what_is_no_number():
    rows = [{"epoch": 0, "loss": float("nan"), "val_top1": None}, {"epoch": 1, "loss": 2.0}]
    figure = plots.curves_plot(rows)
    assert [a.get_title() for a in figure.axes] == ["loss"]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1]
    assert plots.curves_plot([{"epoch": 0}]) is None


class Links(HTMLParser):
    """Whatever a page refers to, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.links, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "action", "srcset")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_shows_all_of_a_run_and_fetches_nothing(run):
    text = write_page(run).read_text()
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.links) == 3
    for link in links.links:
        picture = base64.b64decode(link.removeprefix("data:image/png;base64,"), validate=True)
        Image.open(io.BytesIO(picture)).verify()
    plain = re.sub(r"base64,[^\"]+", "", text)
    assert "http" not in plain
    assert "url(" not in plain
    assert "@import" not in plain
    for told in ("QLinearConv", "61.3", "2.11 times float", "160,000 (6.2 times smaller)", "98.3%"):
        assert told in plain
    assert "91.50 (float 91.73)" in plain
    assert "version: 1" in plain
    assert "<title>a&lt;b - mpq</title>" in plain
    assert "blocks[0].&lt;odd&gt;" in plain


def test_page_of_a_part_of_a_run(run):
    for path in run.iterdir():
        if path.name != "bench.jsonl":
            path.unlink()
    text = page(run)
    assert "Accuracy, size and speed" in text
    assert "Certificate" not in text


def test_page_embeds_pictures_that_have_no_numbers(run):
    (run / "sensitivity.json").unlink()
    picture = plots.png(plots.pareto_plot(sensitivity()))
    (run / "pareto.png").write_bytes(picture)
    assert base64.b64encode(picture).decode() in page(run)


def test_page_names_the_file_that_is_wrong(run):
    (run / "verify.json").write_text('{"layers": []}')
    with pytest.raises(UsageError, match=r"verify\.json must be as `mpq export` writes it"):
        write_page(run)
    (run / "verify.json").write_text("{")
    with pytest.raises(UsageError, match=r"verify\.json .* It is not JSON"):
        write_page(run)
    (run / "verify.json").unlink()
    (run / "policy.yaml").write_text("version: 1\nlayerz: []\n")
    with pytest.raises(PolicyError, match="layerz is not a known key"):
        write_page(run)
    assert not (run / "report.html").exists()


def test_page_wants_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"must be a run folder, with at least one of .*policy"):
        page(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        page(tmp_path / "absent")
