"""The page of a run: what it holds, and what it does in a browser."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reportdata import CONVS, NAMES, bench_rows, metrics, model, policy, sensitivity, write_run

from mpq import origins
from mpq.cli import main
from mpq.errors import PolicyError, UsageError
from mpq.pipeline.demo import DemoRow
from mpq.policy import Policy
from mpq.report.compare import comparison
from mpq.report.front import picked
from mpq.report.headline import compared, results_table
from mpq.report.page import page, write_page
from mpq.report.sections import curves_of
from mpq.report.wires import begins_float, rows
from mpq.saved import Kind

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
TITLES = ("Accuracy, size and speed", "Pareto front", "Sensitivity and bits along the network",
          "Diagnosis", "Weights and inputs of the worst layers", "Graph of the exported file",
          "Predicted against measured", "Training", "Certificate", "Verification", "Policy",
          "Commands that repeat it")  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "a<b")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of a whole run, written once."""
    return write_page(write_run(tmp_path_factory.mktemp("page") / "a<b"))


class Reader(HTMLParser):
    """What a page refers to, its headings, and what says a plot in words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alts: list[str] = []
        self.heads: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.inside = tag
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "srcset")]
        if given.get("role") == "img" and "id" not in given:
            self.alts.append(given["aria-label"])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "h2":
            self.heads.append(data)


def test_the_page_shows_all_of_a_run_and_refers_to_nothing_else(written):
    text = written.read_text()
    found = Reader(text)
    assert found.heads == list(TITLES)
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert len(text.encode()) < 3e6
    for told in ("6.2 times smaller than float", "2.11 times as fast", "98.3%", "QLinearConv",
                 "top-1 91.50 % against 91.73 % in float, a difference within chance",
                 "90.94 to 92.03, 10,000 images", "61.3", "Spearman&#39;s rho 1.000",
                 "a&lt;b", "blocks[0].&lt;odd&gt;", "No peer was measured",
                 "float where integers were to be"):  # fmt: skip
        assert told in text, told


def test_every_plot_is_told_in_words(written):
    text = written.read_text()
    alts = Reader(text).alts
    assert len(alts) == text.count('style="display: contents;"') == 13
    assert any(alt.startswith("Accuracy over size. float: 1,000 kB, top-1 91.73 %") for alt in alts)
    assert any(
        "12 configurations" in alt and "from 101 with a predicted drop of 20.5" in alt
        for alt in alts
    )


def test_a_page_of_a_part_of_a_run(run):
    only(run, "sensitivity.json", "policy.yaml")
    text = page(run)
    assert Reader(text).heads == [TITLES[1], TITLES[2], TITLES[10], TITLES[11]]
    (run / "policy.yaml").unlink()
    assert "Download policy" not in page(run)


def only(run, *names):
    """Take the other files of a run away."""
    for path in run.iterdir():
        if path.name not in names:
            path.unlink()


def test_what_is_of_another_network_is_left_out_and_said(run):
    only(run, "verify.json", "certificate.json", "model.onnx")
    made = {"verify.json": {"model.onnx": "0" * 64}, "certificate.json": {}}
    origins.note(run, run, "export", made)
    text = page(run)
    assert "Left out" in text
    assert "verify.json is stale" in text
    assert "Runtime against simulation" not in text
    assert "QLinearConv" in text


def test_the_page_of_a_demo_has_its_configurations(run):
    only(run, "policy.yaml")
    assert "Configurations of the demo" not in page(run)
    rows = [DemoRow(name, "model.onnx", 98.05, 9000, 1.5, 1.0, 1.0, 359)
            for name in ("QAT 8/4", "QAT 8/4, distilled")]  # fmt: skip
    origins.keep(run, "demo.json", json.dumps([asdict(row) for row in rows]), "demo", ())
    text = page(run)
    assert "Configurations of the demo" in text
    assert "QAT 8/4, distilled" in text
    assert "98.05" in text


def test_curves_of_another_stage_than_the_model_are_not_shown(run):
    only(run, "metrics.jsonl", "model.onnx", "policy.yaml")
    for name in ("ptq.pth", "qat.pth"):
        Kind("k", 1, "").save(run / name, {})
    origins.note(run, run, "x", {n: {} for n in ("policy.yaml", "ptq.pth", "qat.pth")})
    known = origins.origins(run)
    made = {"model.onnx": {"ptq.pth": known["ptq.pth"].sha256}, "metrics.jsonl": {}}
    origins.note(run, run, "x", made)
    assert "weights of the teachers" not in page(run)
    made["model.onnx"] = {"qat.pth": known["qat.pth"].sha256}
    origins.note(run, run, "x", made)
    assert "weights of the teachers" in page(run)
    (run / "metrics.jsonl").write_text(json.dumps(metrics()[0]) + "\n")
    origins.note(run, run, "x", made)
    text = page(run)
    assert "weights of the teachers" not in text  # a single epoch makes no curve
    assert "train_loss" in text


def test_the_page_names_the_file_that_is_wrong(run):
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


def test_the_page_wants_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"must be a run folder, with at least one of .*policy"):
        page(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        page(tmp_path / "absent")


def test_every_point_of_the_front_has_the_policy_that_it_shows(run):
    scores, base = sensitivity(), policy()
    data = picked(scores, base, run)
    front = sorted(scores["front"], key=lambda p: p["effective_bits"])
    assert len(data["points"]) == len(front) == 12
    for point, shown in zip(front, data["points"], strict=True):
        text = "".join(data["lines"][i] + "\n" for i in shown["lines"])
        found = Policy.from_yaml(text)
        bits = [c.weight_bits for c in found.choices(NAMES).values()]
        assert bits[:-1] == [pair[0] for pair in point["widths"].values()][:-1]
        assert found.choices(NAMES)["linear"].locked  # whatever the search says of it
        assert found.model == base.model
        params = 10_000 * sum(pair[0] for pair in point["widths"].values()) // 8
        assert shown["chosen"] or found.result.weight_bytes == params
    own = data["points"][data["picked"]]
    assert own["file"] == "policy.yaml"
    text = "".join(data["lines"][i] + "\n" for i in own["lines"])
    assert text == (run / "policy.yaml").read_text()


def test_the_graph_has_branches_widths_and_the_place_where_float_begins(tmp_path):
    model(tmp_path / "model.onnx")
    proof = [{"name": n, "asked": "W8A8", "integer": n != "linear", "reason": ""} for n in CONVS]
    found = rows(tmp_path / "model.onnx", {"layers": proof})
    assert [(r.name, r.op, r.inputs, r.lane) for r in found] == [
        ("conv1", "Conv + Relu", (-1,), 0),
        ("layer1.0.conv1", "Conv", (0,), 1),
        ("", "Add", (1, 0), 0),
        ("linear", "Conv", (2,), 0),
    ]
    assert [r.integer for r in found] == [True, True, True, False]
    assert begins_float(found) == [3]
    assert found[0].shape == "2 \N{MULTIPLICATION SIGN} 4 \N{MULTIPLICATION SIGN} 4"
    assert found[0].bits == "8"


def test_curves_skip_what_is_no_number_and_have_the_teachers():
    records = [{"epoch": 0, "loss": float("nan"), "val_top1": None}, {"epoch": 1, "loss": 2.0}]
    assert curves_of(records) == {"loss": {"loss": [(1, 2.0)]}}
    found = curves_of(metrics())
    assert list(found) == ["loss", "top-1, percent", "learning rate", "weights of the teachers"]
    assert found["weights of the teachers"]["teacher 2"][0] == (1, 0.6)


def test_a_metric_of_the_users_is_told_beside_float():
    plain, model = ({**row, "top1": None, "n": 0} for row in bench_rows())
    lost = {"value": 0.01, "low": -0.002, "high": 0.022}
    plain |= {"metric": "mAP", "value": 0.32}
    model |= {"metric": "mAP", "value": 0.31, "lost": lost}
    grid = results_table([plain, model])
    assert [c.title for c in grid.columns][3:5] == ["mAP", "lost, 95 %"]
    assert grid.rows[1][3:5] == ("0.31", "-0.002..0.022")
    assert compared(model, plain).startswith("160 kB, 6.2 times smaller than float")
    assert "mAP 0.31 against 0.32 in float" in compared(model, plain)


def test_runs_side_by_side(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert main(["report", "--compare", str(first), str(second / "model.onnx")]) == 0
    text = (tmp_path / "compare.html").read_text()
    heads = ["In figures", "Accuracy over size", "Pareto fronts", "Bits of each layer"]
    assert Reader(text).heads == heads
    other = policy().replace(model=policy().model.replace(sha256="cd" * 32))
    (second / "policy.yaml").write_text(other.to_yaml())
    text = comparison([first, second])
    assert "These runs are of different weights" in text
    assert "Pareto fronts" not in Reader(text).heads


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--compare", "a"], "two runs or more"), (["--compare", "a", "a"], "one of them twice"),
     (["a", "b"], "by --compare")],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(tmp_path, monkeypatch, capsys, given, told):
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"))
    assert main(["report", *given]) == 2
    assert told in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, written):
    """The page of a run in a browser, and what went wrong there."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    shown, wrong = context.new_page(), []
    shown.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
    shown.goto(written.as_uri())
    shown.evaluate("window.mpqReady")
    yield shown, wrong
    context.close()


def test_in_a_browser_the_front_is_picked_and_its_policy_is_the_one_shown(opened, tmp_path):
    shown, wrong = opened
    canvas = shown.locator("#front figure")
    assert shown.locator("#pick-title").inner_text() == "Chosen: policy.yaml"
    canvas.scroll_into_view_if_needed()
    x, y = shown.evaluate(POINT, 0)  # the cheapest: all layers at 4 bits but the one locked
    shown.mouse.click(x, y)
    assert shown.locator("#pick-title").inner_text() == "Point 1 of 12"
    with shown.expect_download() as started:
        shown.get_by_role("button", name="Download policy").click()
    path = tmp_path / started.value.suggested_filename
    started.value.save_as(path)
    choices = Policy.load(path).choices(NAMES)
    names, widths = shown.locator("#pick-bits .name").all_text_contents(), shown.evaluate(SHOWN)
    assert names == NAMES
    assert widths == ["W4A8"] * len(NAMES)
    assert [c.asked for c in choices.values()] == [*widths[:-1], "W8A8"]

    shown.locator("#pick-range").focus()
    shown.keyboard.press("ArrowRight")
    assert shown.locator("#pick-title").inner_text() == "Point 2 of 12"
    head = shown.locator("#layers th", has_text="params")
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert wrong == []


WIDE = """[...document.querySelectorAll("section > *, header > *, figure > div > *")].filter(
    (e) => e.getBoundingClientRect().right > 391).map((e) => e.tagName + " " + e.className)"""
POINT = """(i) => {
    const source = Bokeh.documents[0].get_model_by_name("front");
    const reads = (view) => view.model.renderers.some((r) => r.data_source === source);
    const view = [...Bokeh.index].find(reads);
    const box = view.canvas_view.el.getBoundingClientRect();
    return [box.x + view.frame.x_scale.compute(source.data.x[i]),
            box.y + view.frame.y_scale.compute(source.data.y[i])];
}"""
SHOWN = "[...document.querySelectorAll('#pick-bits span:last-child')].map((e) => e.textContent)"


def test_in_a_browser_nothing_overflows_a_phone_and_the_night_is_dark(opened):
    shown, wrong = opened
    shown.set_viewport_size({"width": 390, "height": 800})
    shown.wait_for_timeout(300)  # plots follow in a frame or two
    assert shown.evaluate(WIDE) == []
    assert shown.evaluate("document.documentElement.scrollWidth") == 390
    ground = "getComputedStyle(document.body).backgroundColor"
    axis = "[...Bokeh.documents[0].roots()[0].references()].find((m) => m.type === 'LinearAxis')"
    colours = []
    for scheme in ("light", "dark"):
        shown.emulate_media(color_scheme=scheme)
        colours.append((shown.evaluate(ground), shown.evaluate(f"{axis}.axis_line_color")))
    assert colours[0][0] == "rgb(255, 255, 255)"
    assert all(day != night for day, night in zip(*colours, strict=True))
    assert wrong == []
