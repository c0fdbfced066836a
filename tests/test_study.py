"""The study: its plan, its stages, a run that is stopped and goes on, and what it leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.study import parcel, results, shelf  # noqa: E402
from benchmarks.study.__main__ import main as study_command  # noqa: E402
from benchmarks.study.check import check  # noqa: E402
from benchmarks.study.clock import Clock, TimeUpError  # noqa: E402
from benchmarks.study.networks import opened  # noqa: E402
from benchmarks.study.plan import PLANS, Plan  # noqa: E402
from benchmarks.study.shelf import Shelf  # noqa: E402
from benchmarks.study.stages import select, stages_of  # noqa: E402
from benchmarks.study.work import Study, data_key  # noqa: E402
from mpq import trusting  # noqa: E402
from mpq.errors import UsageError  # noqa: E402
from mpq.policy import Policy  # noqa: E402

SMALL = """
name: small
data: {name: digits, holdout: 64, limit: 64}
recipes:
  short: {base: plain, epochs: 2, batch: 32, flip: false, checkpoint_every: 2}
  taught: {base: plain, epochs: 1, batch: 32, flip: false, cycle: 1}
  tune: {base: qat, epochs: 1, batch: 32, flip: false}
networks:
  - {name: teacher, arch: resnet8_conv, recipe: short}
  - {name: scratch, arch: resnet8, recipe: short}
  - {name: taught, arch: resnet8, recipe: taught, teachers: [teacher]}
policies:
  narrow: {uniform: [4, 4], ends: 8, residual: 8}
  mixed: {bits: [8, 4], budget: {effective_bits: 5}}
rows:
  - {name: float, network: [scratch, taught]}
  - {name: static, network: taught, policy: narrow, method: ptq, claim: false, published: 90.5}
  - {name: dynamic, network: taught, method: dynamic, claim: false, keep: false}
  - {name: mixed, network: taught, policy: mixed, method: qat, recipe: tune, teachers: [teacher],
     unlabelled: digits}
effort: fast
latency_runs: 1
rank: {candidates: [resnet8], recipe: taught}
"""


def data_of(plan: Plan) -> str:
    return data_key(opened(plan.data))


def write_plan(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan.load(write_plan(tmp_path_factory.mktemp("plan")))


class Ticks:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture(scope="module")
def made(
    plan: Plan, once: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """Runs, results, and what was told: the time was up twice, the first time within a training."""

    def make(folder: Path) -> None:
        told: list[str] = []

        def study(clock: Clock) -> Study:
            shelf = Shelf(folder / "runs", plan.name)
            return Study(plan, shelf, folder / "results", "cpu", clock, told.append)

        with pytest.raises(TimeUpError):
            study(Clock(3 / 60, now=Ticks())).run()
        with pytest.raises(TimeUpError):
            study(Clock(12 / 60, now=Ticks())).run()
        told.append("last call")
        study(Clock()).run()
        (folder / "told.json").write_text(json.dumps(told))

    folder = tmp_path_factory.mktemp("study") / "copy"
    shutil.copytree(once("study", make), folder)
    return folder / "runs", folder / "results", json.loads((folder / "told.json").read_text())


def test_a_stopped_study_goes_on_where_it_was(made: tuple[Path, Path, list[str]]) -> None:
    _, _, told = made
    begun = [line.split("] ")[1] for line in told if "] " in line]
    assert begun.count("network-scratch-s0") == 2
    epochs = [line for line in told if line.startswith("  epoch")]
    assert len(epochs) == 2 + 2 + 1 + 1  # each epoch of each training once
    assert len([line for line in told[told.index("last call") :] if "] " in line]) < len(begun)


def test_rows_say_what_was_done_on_what(made: tuple[Path, Path, list[str]]) -> None:
    _, kept, _ = made
    rows = {row["row"]: row for row in results.read_csv(kept / "rows.csv")}
    assert list(rows) == ["float", "static", "dynamic", "mixed"]
    assert rows["float"]["network"] in ("scratch", "taught")
    assert rows["static"]["test_top1"] == ""  # no claim: the test images were not read for it
    assert float(rows["mixed"]["test_top1"]) >= 0
    assert rows["mixed"]["epochs"] == "2"
    assert rows["mixed"]["images_seen"] == "192"  # 64 by the student, 64 and 64 without labels
    assert float(rows["mixed"]["effective_bits"]) <= 5
    assert float(rows["static"]["integer_coverage"]) == 1
    assert int(rows["static"]["bytes"]) == (kept / rows["static"]["file"]).stat().st_size
    assert float(rows["dynamic"]["validation_top1"]) >= 0
    assert int(rows["dynamic"]["bytes"]) > 0
    assert not rows["dynamic"]["file"]  # not to be kept
    assert not (kept / "files" / "dynamic-s0.onnx").exists()
    assert all(row["machine"] and row["torch"] and row["code"] for row in rows.values())
    table = (kept / "table.md").read_text(encoding="utf-8")
    assert "| static |" in table
    assert "| 90.50 |" in table
    assert "| resnet8 |" in table
    assert set(json.loads((kept / "curves.json").read_text())) >= {"network-teacher-s0"}


def test_first_and_last_layer_are_spared_as_in_published_tables(
    made: tuple[Path, Path, list[str]],
) -> None:
    _, kept, _ = made
    policy = Policy.load(kept / "files" / "static-s0.yaml")
    widths = {c.name: c.weight.bits for c in policy.layers if c.weight}
    assert list(widths) == ["conv1", "linear"]
    assert set(widths.values()) == {8}
    assert policy.default.weight.bits == policy.default.activation.bits == 4
    assert policy.model.checkpoint == "../networks/taught-s0.pth"  # wherever the results lie
    assert (kept / "files" / policy.model.checkpoint).is_file()


def test_a_finished_study_does_nothing(plan: Plan, made: tuple[Path, Path, list[str]]) -> None:
    runs, kept, _ = made
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*.pth")}
    again: list[str] = []
    Study(plan, Shelf(runs, plan.name), kept, "cpu", Clock(0), again.append).run()
    assert again == []
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*.pth")} == before


def test_check_measures_again_and_finds_what_differs(
    plan: Plan, made: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    _, kept, _ = made
    assert check(kept, plan) == []
    copy = tmp_path / "results"
    copy.mkdir()
    for folder in ("files", "networks"):
        (copy / folder).symlink_to(kept / folder)
    text = (kept / "rows.csv").read_text(encoding="utf-8")
    row = next(r for r in results.read_csv(kept / "rows.csv") if r["row"] == "static")
    (copy / "rows.csv").write_text(text.replace(f",{row['bytes']},", ",1,"), encoding="utf-8")
    assert check(copy, plan, only=("static",)) == [
        f"static (seed 0): bytes must be 1. Got {row['bytes']}"
    ]
    with pytest.raises(UsageError, match=r"rows must be some of .* Got none-such"):
        check(kept, plan, only=("none-such",))


def test_rows_stay_where_their_stages_are_gone(
    plan: Plan, made: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    _, kept, _ = made
    before = (kept / "rows.csv").read_bytes()
    with pytest.raises(TimeUpError):
        Study(plan, Shelf(tmp_path / "bare", plan.name), kept, "cpu", Clock(0), print).run()
    assert (kept / "rows.csv").read_bytes() == before


def test_lines_follow_what_the_plan_says_of_their_rows(
    plan: Plan, made: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    copy = tmp_path / "kept"
    shutil.copytree(made[1], copy)
    changed = {"title": "other", "keep": False}
    rows = [r.model_copy(update=changed) if r.name == "static" else r for r in plan.rows]
    other = plan.model_copy(update={"rows": tuple(rows)})
    bare = Shelf(tmp_path / "bare", plan.name)
    results.write(other, bare, copy, stages_of(other, data_of(other)))
    found = {row["row"]: row for row in results.read_csv(copy / "rows.csv")}
    assert found["static"]["title"] == "other"
    assert not found["static"]["file"]
    assert not found["static"]["checkpoint"]
    assert found["mixed"]["file"]


def test_kept_students_spare_their_training(
    plan: Plan, made: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    _, kept, _ = made
    copy, told = tmp_path / "kept", list[str]()
    shutil.copytree(kept, copy)
    curves = (copy / "curves.json").read_bytes()
    bare = Shelf(tmp_path / "bare", plan.name)
    Study(plan, bare, copy, "cpu", Clock(), told.append, from_kept=True).run(["row-static-s0"])
    assert [line for line in told if "] " in line] == [
        "[1/2] network-taught-s0",
        "[2/2] row-static-s0",
    ]
    assert f"  taken from {copy / 'networks' / 'taught-s0.pth'}" in told
    before, after = (
        {row["row"]: row for row in results.read_csv(path / "rows.csv")} for path in (kept, copy)
    )
    assert list(after) == list(before)
    assert after["static"]["sha256"] == before["static"]["sha256"]
    assert after["static"]["epochs"] == before["static"]["epochs"]
    assert (copy / "curves.json").read_bytes() == curves


def test_students_of_another_plan_part_are_trained_again(
    plan: Plan, made: tuple[Path, Path, list[str]]
) -> None:
    _, kept, _ = made
    assert "network-taught-s0" in results.kept_networks(kept, stages_of(plan, data_of(plan)))
    recipes = plan.recipes | {"taught": plan.recipes["taught"] | {"lr": 0.07}}
    other = plan.model_copy(update={"recipes": recipes})
    assert "network-taught-s0" not in results.kept_networks(kept, stages_of(other, data_of(other)))


def test_other_plans_and_other_code_are_refused(
    plan: Plan, made: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, kept, _ = made
    with pytest.raises(UsageError, match=r"holds the results of plan small, not of other"):
        Shelf(runs, "other")
    monkeypatch.setattr(shelf, "code_version", lambda: "0123456789ab")
    study = Study(plan, Shelf(runs, plan.name), kept, "cpu", Clock(), print)
    with pytest.raises(UsageError, match=r"made by code version .* this is 0123456789ab.*any-code"):
        study.run()
    Study(plan, Shelf(runs, plan.name, any_code=True), kept, "cpu", Clock(0), print).run()


def test_a_second_process_is_kept_out(plan: Plan, tmp_path: Path) -> None:
    place = Shelf(tmp_path / "runs", plan.name)
    with (
        place.locked(),
        pytest.raises(UsageError, match=r"is in use by another run of this study"),
        Shelf(tmp_path / "runs", plan.name).locked(),
    ):
        pass


def test_a_full_disk_leaves_what_was_finished(
    plan: Plan, made: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, kept, _ = made
    next(runs.glob("row-static*/done.json")).unlink()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Shelf, "finish", full)
    study = Study(plan, Shelf(runs, plan.name), kept, "cpu", Clock(), print)
    with pytest.raises(OSError, match="No space left"):
        study.run()
    monkeypatch.undo()
    study.run()
    assert next(runs.glob("row-static*/done.json")).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("effort: fast", "efort: fast"), r"efort is not a known key; did you mean effort"),
        (("teachers: [teacher]}\npol", "teachers: [techer]}\npol"),
         r"network taught names 'techer', which must be a network above it.*did you mean"),
        (("recipe: tune, teachers", "recipe: tunes, teachers"), r"row mixed: recipe names 'tunes'"),
        (("policy: narrow, method: ptq", "method: ptq"), r"row static must have a policy"),
        (("teachers: [teacher],\n", "\n"), r"row mixed must have teachers to say what"),
        (("name: static", "name: mixed"), r"rows must have different names. Got mixed twice"),
        (("arch: resnet8,", "arch: resnet9,"), r"resnet9"),
        (("{name: teacher, ", "{name: teacher, normalize: nosuch, "), r"nosuch"),
        (("{uniform: [4, 4],", "{uniform: [9, 4],"), r"bits must be one of .*Got 9"),
        (("effective_bits: 5}", "effective_bits: 3}"), r"effective_bits must be within bits"),
        (("candidates: [resnet8]", "candidates: [resnet9]"), r"resnet9"),
        (("epochs: 2,", "epochs: 0,"), r"epochs: Input should be greater than or equal to 1"),
        (("{uniform: [4, 4], ends: 8, residual: 8}", "{}"),
         r"a policy must have uniform widths or a budget"),
        (("{bits: [8, 4],", "{ends: 8,"),
         r"ends and residual are those of a policy with uniform widths"),
        (("{bits: [8, 4],", "{residual: 8,"),
         r"ends and residual are those of a policy with uniform widths"),
    ],
)  # fmt: skip
def test_a_wrong_plan_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SMALL
    with pytest.raises(UsageError, match=message):
        Plan.load(write_plan(tmp_path, SMALL.replace(*change)))


def test_a_teacher_of_other_classes_is_refused_before_any_work(
    tmp_path: Path, mpq_data: Path
) -> None:
    wrong = "checkpoint: resnet20-cifar10.pth, normalize: imagenet"
    text = SMALL.replace("arch: resnet8_conv, recipe: short", wrong).replace("digits", "cifar100")
    told: list[str] = []
    found = Plan.load(write_plan(tmp_path, text))
    study = Study(found, Shelf(tmp_path / "r", "small"), tmp_path, "cpu", Clock(), told.append)
    with pytest.raises(UsageError, match=r"network teacher must tell the 100 classes of cifar100"):
        study.run()
    assert told == []


def test_a_checkpoint_of_a_users_architecture_is_read(mpq_data: Path, tmp_path: Path) -> None:
    short = Plan.load(PLANS / "cifar100-resnet20.yaml").rehearsal(16)
    made = Shelf(tmp_path / "runs", short.name)
    with trusting(*short.code()):
        Study(short, made, tmp_path / "kept", "cpu", Clock(), print).run(("network-public*",))
    assert len(list(made.root.glob("network-public-s0-*/model.pth"))) == 1


@pytest.mark.parametrize(("limit", "other_half"), [(0, True), (32, False)])
def test_the_half_that_nothing_was_chosen_on_has_a_figure_unless_a_limit_cut_it(
    tmp_path: Path, limit: int, *, other_half: bool
) -> None:
    where = f"holdout: 0, choose: first half of test, limit: {limit}"
    text = SMALL.replace("holdout: 64, limit: 64", where).replace("epochs: 2", "epochs: 1")
    found = Plan.load(write_plan(tmp_path, text))
    made = Shelf(tmp_path / "runs", found.name)
    Study(found, made, tmp_path / "kept", "cpu", Clock(), print).run(("test-float-s0",))
    (done,) = made.root.glob("test-float-s0-*/done.json")
    told = json.loads(done.read_text(encoding="utf-8"))
    assert ("test_second_half" in told) == other_half
    assert told["n"] == (limit or 359)


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_plans_that_come_with_it_load_and_rehearse(path: Path) -> None:
    found = Plan.load(path)
    assert found.name == path.stem
    stages = stages_of(found, "")
    assert len({s.folder for s in stages}) == len(stages)
    short = found.rehearsal(64)
    assert {short.recipe(name).epochs for name in short.recipes} == {1}
    names = [s.name for s in stages if s.kind != "rank"]
    assert [s.name for s in stages_of(short, "few")] == names


def test_what_a_stage_needs_is_made_before_it(plan: Plan) -> None:
    stages = stages_of(plan, "")
    seen: set[str] = set()
    for stage in stages:
        assert seen >= set(stage.needs)
        seen.add(stage.name)
    names = [s.name for s in select(stages, ["row-static-s0"])]
    assert names == ["network-teacher-s0", "network-taught-s0", "row-static-s0"]
    with pytest.raises(UsageError, match=r"Got 'row-statik-s0'; did you mean row-static-s0"):
        select(stages, ["row-statik-s0"])


def test_seeds_of_a_row_may_share_a_network(plan: Plan) -> None:
    rows = [r.model_copy(update={"seeds": (0, 1)}) if r.name == "static" else r for r in plan.rows]
    networks = [
        n.model_copy(update={"seed": 0}) if n.name == "taught" else n for n in plan.networks
    ]
    one = plan.model_copy(update={"rows": tuple(rows), "networks": tuple(networks)})
    stages = {s.name: s for s in stages_of(one, "")}
    assert stages["row-static-s1"].needs == stages["row-static-s0"].needs == ("network-taught-s0",)
    before = {s.name: s.key for s in stages_of(plan, "")}
    assert stages["row-static-s0"].key == before["row-static-s0"]
    each = plan.model_copy(update={"rows": tuple(rows)})
    assert "network-taught-s1" in {s.name for s in stages_of(each, "")}


def test_what_was_made_stays_made_when_recipes_and_policies_get_new_choices() -> None:
    """Keys of work that is kept: where this fails, name the new choice in `stages.LATER`."""
    found = stages_of(Plan.load(PLANS / "cifar10-resnet20.yaml"), "")
    keys = {stage.name: stage.key[:10] for stage in found}
    assert keys["network-taught-60-s0"] == "936a896cc8"
    assert keys["row-public-8-4-s0"] == "36d693a909"


@pytest.mark.parametrize(
    ("change", "other"),
    [
        (lambda p: {"data": p.data}, []),
        (lambda p: {"effort": "good"},
             [f"row-{name}-s0" for name in ("float", "static", "dynamic", "mixed")]),
        (lambda p: {"recipes": p.recipes | {"tune": p.recipes["tune"] | {"lr": 1.0}}},
         ["row-mixed-s0"]),
    ],
)  # fmt: skip
def test_a_change_makes_only_what_depends_on_it_anew(
    plan: Plan, change: Callable[[Plan], dict[str, Any]], other: list[str]
) -> None:
    before = {s.name: s.key for s in stages_of(plan, "")}
    after = {s.name: s.key for s in stages_of(plan.model_copy(update=change(plan)), "")}
    changed = [n for n in before if before[n] != after[n] and n.startswith(("network", "row"))]
    assert changed == other


def test_wilson_interval() -> None:
    low, high = results.interval(50.0, 100)  # by hand: (0.5 + 0.019208 -+ 0.0998) / 1.038416
    assert (round(low, 1), round(high, 1)) == (40.4, 59.6)
    assert results.interval(100.0, 10)[1] == 100.0


def test_a_stream_in_parts_comes_together_or_says_what_lacks(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(bytes(range(256)) * 100)
    parts = parcel.write_parts("parcel", [("a/b.bin", source)], tmp_path / "parts", 12_000)
    assert len(parts) == 3
    assert max(p.stat().st_size for p in parts) <= 12_000
    parcel.unpack(parts, tmp_path / "there")
    assert (tmp_path / "there/a/b.bin").read_bytes() == source.read_bytes()
    with pytest.raises(UsageError, match=r"the 2 parts of parcel-.* are not all of it"):
        parcel.unpack(parts[:2], tmp_path / "there")


def test_what_is_worth_most_comes_back_first(made: tuple[Path, Path, list[str]]) -> None:
    runs, _, _ = made
    entries = parcel.worth(runs)
    names = [name for name, _ in entries]
    ends = [Path(name).name for name in names]
    assert ends.index("done.json") < ends.index("model.onnx") < ends.index("model.pth")
    assert not any(n.startswith("row-float") and n.endswith("model.onnx") for n in names)
    assert any(n.startswith("row-dynamic") and n.endswith("model.onnx") for n in names)
    assert not any(n.endswith("checkpoint.pth") for n in names)  # all trainings are over
    taken, left = parcel.within(entries, 60_000)
    assert taken
    assert left
    assert {n for n, _ in taken} | set(left) == set(names)


def test_what_came_in_a_part_does_not_go_back(
    made: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    there, back, home = tmp_path / "there", tmp_path / "back", tmp_path / "home"
    parcel.unpack(parcel.write_parts("parcel", parcel.worth(made[0]), tmp_path, 1 << 24), there)
    changed = next(there.glob("row-mixed-*/done.json"))
    changed.write_text(changed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    sizes = ["--bytes", str(1 << 24), "--total", str(1 << 24)]
    CliRunner().invoke(parcel.main, ["bring", str(there), str(back), *sizes])
    parcel.unpack(list(back.iterdir()), home)
    assert [p for p in home.rglob("*") if p.is_file()] == [home / changed.relative_to(there)]


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """Variables that make this computer the bare machine that takes parts."""
    return {"STUDY_HOME": str(tmp_path / "there"), "PATH": "/usr/bin:/bin"}


def remote(machine: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks/study/remote.sh"
    return subprocess.run(
        ["bash", script, *args], capture_output=True, text=True, env=machine, cwd=ROOT, check=False
    )


def test_a_part_must_find_the_one_before_it(machine: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"x" * 30_000)
    first, second, *_ = parcel.write_parts("parcel", [("f", source)], tmp_path / "parts", 12_000)
    found = remote(machine, "place", str(second))
    assert found.returncode == 2
    assert f"{second.name} needs {first.name}" in found.stderr
    assert "Begin with part 01" in found.stderr
    assert remote(machine, "place", str(first)).returncode == 0
    assert remote(machine, "place", str(second)).returncode == 0
    assert remote(machine, "place", str(source)).returncode == 2


def test_the_command_says_what_is_wrong_with_its_input(tmp_path: Path) -> None:
    for args, message in [
        (
            ["no-such-plan"],
            "the plan must be a YAML file or one of cifar10-ablations, cifar10-fast",
        ),
        (["check", str(tmp_path)], "the plan must be a YAML file"),
    ]:
        found = CliRunner().invoke(study_command, args)
        assert found.exit_code == 2
        assert message in found.stderr


RESULTS = sorted((ROOT / "benchmarks/results").glob("*/rows.csv"))


@pytest.mark.parametrize("rows", RESULTS, ids=lambda p: p.parent.name)
def test_the_study_prints_the_tables_of_its_results(rows: Path) -> None:
    page = (ROOT / "docs/study.md").read_text(encoding="utf-8")
    marked = page.split(f"<!-- results: {rows.parent.name} -->\n")[1].split("<!-- end -->")[0]
    table = (rows.parent / "table.md").read_text(encoding="utf-8")
    assert marked == table[table.index("## ") :].replace("## ", "### ") + "\n"
    found = Plan.load(rows.parent / "plan.yaml")
    lines = results.read_csv(rows)
    assert {row["row"] for row in lines} <= {row.name for row in found.rows}
    for line in lines:
        row = found.row(line["row"])
        trained = found.trained(row.networks[0]) + found.epochs(row.recipe)
        assert int(line["epochs"]) == trained  # with those of the networks that it began as
    assert table == results.table(found, lines, _ranked(rows.parent))


def test_accuracies_in_the_text_are_those_of_rows() -> None:
    plans = [Plan.load(path) for path in PLANS.glob("*.yaml")]
    known = {f"{row.published:.2f}" for plan in plans for row in plan.rows if row.published}
    for path in RESULTS:
        known.update(FIGURE.findall((path.parent / "table.md").read_text(encoding="utf-8")))
        for line in results.read_csv(path):
            seen = [line["validation_top1"], line["test_top1"]]
            known.update(f"{float(top1):.2f}" for top1 in seen if top1)
    for page in ("docs/study.md", "docs/results.md", "README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"<!-- results: .*?<!-- end -->", "", text, flags=re.DOTALL)
        if page != "docs/study.md":  # the sentences there that are of the study
            text = "".join(t for t in re.split(r"(?<=\.)\s|\n\|", text) if "study.md" in t)
        assert set(FIGURE.findall(text)) <= known, page


FIGURE = re.compile(r"(?<![\d.,+-])[5-9]\d\.\d\d(?!\d)")
"""A top-1 in percent, with two decimals."""


def _ranked(folder: Path) -> Any:
    path = folder / "rank.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else ()


STUDIED = {
    path: found.groups()
    for path in sorted((ROOT / "policies").glob("*.yaml"))
    if (found := re.search(r"benchmarks\.study (\S+) --only test-(\S+)-s0", path.read_text()))
}


@pytest.mark.parametrize("path", STUDIED, ids=lambda path: path.stem)
def test_policies_of_the_study_say_what_its_rows_say(path: Path) -> None:
    plan, name = STUDIED[path]
    kept = ROOT / "benchmarks" / "results" / plan
    rows = results.read_csv(kept / "rows.csv")
    row = next(r for r in rows if r["row"] == name and r["seed"] == "0")
    text = path.read_text()
    assert f"# Seen: {float(row['test_top1']):.2f} % of 10,000 test images" in text
    assert f", {int(row['bytes']):,} bytes." in text
    policy, found = Policy.load(path), Policy.load(kept / "files" / f"{name}-s0.yaml")
    assert policy.replace(model=found.model) == found
    assert (path.parent / policy.model.checkpoint).resolve() == kept / row["checkpoint"]
    assert (kept / row["checkpoint"]).is_file()


def test_the_smallest_kept_file_is_as_it_was_measured(mpq_data: Path) -> None:
    kept = [
        (int(r["bytes"]), r["row"], f) for f in RESULTS for r in results.read_csv(f) if r["file"]
    ]
    _, name, rows = min(kept)
    assert check(rows.parent, Plan.load(rows.parent / "plan.yaml"), only=(name,)) == []
