from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from reportdata import NAMES, bench_rows, certificate, sensitivity, validation, verify
from rich.console import Console

from mpq.report import plots, tables
from mpq.report.grid import Grid, columns, short, tiny


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


@pytest.mark.usefixtures("arranged")
@pytest.mark.parametrize(
    "figure",
    [
        plots.sensitivity_plot(sensitivity()),
        plots.pareto_plot(sensitivity()),
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
    data = validation()
    axis = plots.validation_plot(data).axes[0]
    assert axis.get_title() == "fisher: Spearman's rho 1.000"
    spots = axis.collections[0].get_offsets()
    assert sorted(map(tuple, spots)) == sorted((p["predicted"], p["kl"]) for p in data["policies"])
    grid = tables.validation_table(data)
    assert [row[0] for row in grid.rows] == ["7.00", "6.00", "5.00", "4.00"]
    assert "rho of prediction and divergence 1.000" in grid.note
