"""Networks of any answers: QAT by teachers and losses, scores of a loss, metrics as judges."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpq
from mpq.cli import main
from mpq.errors import DataError, TrainError, UsageError
from mpq.numerics import kl_divergence
from mpq.train.feed import Loader, Share
from mpq.train.plan import Hooks, Stop
from mpq.train.task import Task

SETTINGS = {"batch": 16, "lr": 0.02, "crop": 0.0, "flip": False, "norm": "folded"}


class Heads(nn.Module):
    """A map of classes and a map of quantities."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.cls_head, self.box_head = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"cls": self.cls_head(x), "boxes": 100 * self.box_head(x)}


def heads(seed: int = 0) -> Heads:
    torch.manual_seed(seed)
    return Heads().eval()


def pictures(count: int = 48, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def masks(x: Tensor) -> Tensor:
    return (4 * x.mean(1)).long().clamp(max=3)


def labelled(count: int = 48, seed: int = 0) -> DataLoader:
    x = pictures(count, seed)
    return DataLoader(TensorDataset(x, masks(x)), batch_size=16)


def only_classes(outputs) -> Tensor:
    return outputs["cls"]


def pixel_loss(outputs, batch) -> Tensor:
    return F.cross_entropy(outputs["cls"], batch[1])


def policy(bits: int) -> mpq.Policy:
    return mpq.Policy.uniform(bits, 8)


# -- what a teacher says -------------------------------------------------------------------------


def test_a_task_adds_up_outputs_by_their_kinds() -> None:
    teacher = heads()
    task = Task({"cls": "places", "boxes": "regression"}, teacher)
    x = pictures()
    task.look(x)
    wanted = task.teach(x)
    assert task.parts(teacher(x), (), wanted, 2.0).loss.abs() < 1e-6
    other = heads(1)(x)
    soft = [(z.movedim(1, -1) / 2).log_softmax(-1) for z in (wanted["cls"], other["cls"])]
    told = 4 * kl_divergence(*soft).mean()
    told += (
        (other["boxes"] - wanted["boxes"]) / wanted["boxes"].std(correction=0)
    ).square().mean() / 2
    torch.testing.assert_close(task.parts(other, (), wanted, 2.0).loss, told, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task({"n": "exact"}, heads()), "nothing .* can be taught: n: exact.*--loss"),
        (lambda: Task({"cls": "places"}), "needs a teacher or a loss"),
    ],
)
def test_tasks_that_teach_nothing(make, message) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_teacher_must_answer_as_the_network_does() -> None:
    with pytest.raises(DataError, match=r"with cls, depth\. Got cls, boxes"):
        Task({"cls": "places", "depth": "regression"}, heads()).teach(pictures(2))
    task = Task({"cls": "places"}, heads())
    with pytest.raises(DataError, match=r"cls must be like the network's, float32 \[2, 3, 8, 8\]"):
        task.parts({"cls": torch.zeros(2, 3, 8, 8)}, (), task.teach(pictures(2)), 1.0)


def test_the_float_network_teaches_pictures_without_labels() -> None:
    found = mpq.qat(heads(), pictures(), policy(3), epochs=4, settings=SETTINGS, metric="agreement",
                    validation=pictures(32, seed=1))  # fmt: skip
    assert found.metrics["teachers"] == ["the float network"]
    assert found.metrics["metric"] == "agreement"
    assert found.metrics["calibrated"] < found.metrics["value"] < 100


def test_a_teacher_of_ones_own() -> None:
    network, teacher = heads(), heads(1)
    found = mpq.qat(network, pictures(), policy(8), teacher=teacher, epochs=6, settings=SETTINGS)
    with torch.no_grad():
        x = pictures(seed=2)
        taught, before, after = (m(x)["boxes"] for m in (teacher, network, found.module))
    assert (after - taught).square().mean() < 0.5 * (before - taught).square().mean()


def test_several_teachers_are_for_classifiers() -> None:
    from mpq.data import Normalization
    from mpq.train.ensemble import Ensemble, Member

    both = Ensemble([Member(n, heads(), Normalization.parse("none")) for n in "ab"])
    with pytest.raises(UsageError, match=r"learns from one teacher\. Got a, b"):
        mpq.qat(heads(), pictures(), policy(8), teacher=both, epochs=1, settings=SETTINGS)


# -- a loss of the user's own --------------------------------------------------------------------


def test_a_loss_trains_on_batches_as_they_come(tmp_path: Path) -> None:
    found = mpq.qat(
        heads(), labelled(), policy(8), loss=pixel_loss, metric="miou", postprocess=only_classes,
        validation=labelled(32, 1), epochs=5, settings=SETTINGS | {"lr": 0.1}, folder=tmp_path,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found.metrics["loss"] == "pixel_loss"
    assert lines[-1]["train_label_loss"] < 0.95 * lines[0]["train_label_loss"]
    assert found.metrics["value"] == max(line["value"] for line in lines)
    assert all(line["metric"] == "miou" and line["val_top1"] is None for line in lines)


def test_the_best_epoch_is_kept_and_survives_an_interrupt(tmp_path: Path) -> None:
    calls: list[float] = []

    def falling(outputs, batch) -> float:
        calls.append(0.0)
        return [5.0, 1.0, 9.0, 3.0, 2.0][min(len(calls) - 1, 4)]

    def stop(record) -> None:
        if record["epoch"] == 1:
            raise Stop

    def qat(**options) -> mpq.Quantized:
        return mpq.qat(
            heads(), pictures(), policy(4), metric=falling, validation=pictures(8, 1), epochs=4,
            settings=SETTINGS, folder=tmp_path, **options,
        )  # fmt: skip

    with pytest.raises(Stop):
        qat(hooks=Hooks(on_epoch=stop))
    calls.insert(0, 0.0)  # a resumed run measures its start too
    del calls[-1]
    found = qat(resume=True)
    assert found.metrics["value"] == 9.0
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert state["best"]["epoch"] == 1
    for name, tensor in found.module.state_dict().items():
        if name in state["best"]["weights"]:
            assert torch.equal(tensor, state["best"]["weights"][name])


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda o, b: o["cls"].mean() * float("nan"),
            TrainError,
            "gave NaN or infinity in epoch 0",
        ),
        (lambda o, b: o["cls"].detach().mean(), UsageError, "no gradient comes from the loss"),
        (
            lambda o, b: o["mask"].mean(),
            UsageError,
            r"failed with KeyError: 'mask'.*\{cls: float32",
        ),
        (lambda o, b: o["cls"], UsageError, "must give a scalar tensor"),
    ],
)
def test_losses_that_teach_nothing(loss, error, message) -> None:
    with pytest.raises(error, match=message):
        mpq.qat(heads(), labelled(16), policy(8), loss=loss, epochs=1, settings=SETTINGS)


def test_a_loader_that_ends_early_or_has_another_structure() -> None:
    class Short(list):
        def __len__(self) -> int:
            return 3

    batches = Short([(pictures(16), masks(pictures(16)))])
    with pytest.raises(DataError, match=r"must come 3 times an epoch.* Got 1"):
        mpq.qat(heads(), batches, policy(8), loss=pixel_loss, epochs=1, settings=SETTINGS)
    with pytest.raises(DataError, match=r"a batch must be.*Got \{mask: float32"):
        Loader([{"mask": torch.zeros(2)}], Share(0, torch.device("cpu"))).identity()
    with pytest.raises(DataError, match="must have a length"):
        Loader(iter([]), Share(0, torch.device("cpu")))


def test_processes_share_batches_out() -> None:
    batch = (torch.arange(6.0).view(6, 1), list("abcdef"))
    shares = [Loader([batch], Share(0, torch.device("cpu"), rank, 2)) for rank in (0, 1)]
    parts = [next(iter(share.parts()))[0] for share in shares]
    assert [p[1] for p in parts] == [["a", "c", "e"], ["b", "d", "f"]]


# -- judging -------------------------------------------------------------------------------------


def test_max_drop_in_a_metric_of_ones_own() -> None:
    found = mpq.analyze(
        heads(), pictures(), budget={"max_drop": 3.0}, metric=("fisher", "agreement"),
        validation=pictures(32, 1), validate=6,
    )  # fmt: skip
    chosen = found.measured[0]
    assert chosen.drop <= 3.0
    assert chosen.interval is not None
    assert chosen.interval[0] <= chosen.drop <= chosen.interval[1]
    data = found.to_json()
    assert data["judge"] == "agreement"
    assert "drop_interval" in data["measured"][0]
    assert found.validation is not None
    assert found.validation.rho_judge > 0.5
    assert "rho_judge" in found.validation.to_json()
    assert any("of agreement (95 %" in str(line) for line in found.shown())


def test_scores_of_a_loss_are_the_losses_of_its_gradient() -> None:
    one = mpq.analyze(heads(), labelled(), loss=pixel_loss, num_calib=32)
    two = mpq.analyze(heads(), labelled(), loss=lambda o, b: 2 * pixel_loss(o, b), num_calib=32)
    assert one.sensitivity.metric == "fisher of pixel_loss"
    assert one.sensitivity.key != two.sensitivity.key
    for a, b in zip(one.sensitivity.rows, two.sensitivity.rows, strict=True):
        assert b.score == pytest.approx(4 * a.score)
    unseen = {row.score for row in one.sensitivity.rows
              if (row.layer, row.part) == ("box_head", "weight")}  # fmt: skip
    assert unseen == {0.0}
    with pytest.raises(DataError, match="all batches must have one structure"):
        mpq.analyze(heads(), [*labelled(16), pictures(16)], loss=pixel_loss)


def test_class_maps_are_scored_as_choices_where_the_metric_is_miou() -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.stem(x).relu())

    maps = Maps().eval()
    plain = mpq.analyze(maps, pictures(16))
    assert plain.policy.outputs == {"output": "regression"}
    found = mpq.analyze(maps, labelled(16), metric="miou")
    assert found.policy.outputs == {"output": "places"}
    assert mpq.ptq(maps, pictures(16), found.policy).policy.outputs == {"output": "places"}


def test_ptq_and_bench_say_what_a_metric_loses(tmp_path: Path) -> None:
    found = mpq.ptq(heads(), pictures(), policy(8), metric="miou", postprocess=only_classes,
                    validation=labelled(32, 1))  # fmt: skip
    lost = found.metrics["lost"]
    assert found.metrics["float_value"] - found.metrics["value"] == pytest.approx(lost["value"])
    assert "miou" in " ".join(map(str, found.shown()))
    for name, bits in (("a", 8), ("b", 4)):
        made = mpq.ptq(heads(), pictures(), policy(bits))
        written = mpq.export(made, tmp_path / f"{name}.onnx", data=pictures(8))
        assert re.search(r"on 8 images: cls [\d.]+% equal, boxes (equal|[\d.]+ dB)", str(written))
    rows = mpq.bench([tmp_path / "a.onnx", tmp_path / "b.onnx"], pictures(32, 1), runs=2,
                     metric="agreement").to_json()  # fmt: skip
    assert rows[0]["value"] == 100.0
    assert "lost" not in rows[0]
    assert rows[1]["lost"]["value"] == pytest.approx(100 - rows[1]["value"])
    assert rows[1]["value"] < 100


CODE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))

def batches():
    x = torch.rand(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, 1 - x), batch_size=8)

def loss(outputs, batch):
    return (outputs - batch[1]).abs().mean()

def mae(outputs, batch):
    return (outputs - batch[1]).abs().flatten(1).mean(1)

def unlabelled():
    return [x for x, _ in batches()]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_the_whole_way_on_the_command_line(here: Path, capsys) -> None:
    judge = ["--batches", "mine:batches", "--metric", "mine:mae", "--lower-is-better"]
    learn = ["--loss", "mine:loss"]
    assert main(["analyze", "mine:net", "-o", "r", "--validate", "4", *judge, *learn]) == 0
    assert main(["ptq", "r", *judge]) == 0
    assert "mine:mae" in capsys.readouterr().out
    assert main(["qat", "r", "--epochs", "2", "--set", "batch=8",
                 "-o", "q", "--json", *judge, *learn]) == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] == "mine:loss"
    assert told["value"] < told["calibrated"] * 1.02
    assert main(["export", "q", "--num-test", "0"]) == 0
    capsys.readouterr()
    assert main(["bench", "q/model.onnx", "--runs", "2", "--json", *judge]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][-1]
    assert row["metric"] == "mine:mae"
    assert row["value"] == pytest.approx(told["value"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "psnr"], "the metric psnr needs pictures"),
        (["--metric", "top1", "--batches", "mine:unlabelled"], "come without"),
    ],
)
def test_metrics_that_need_labels_where_there_are_none(here, capsys, arguments, message) -> None:
    argv = ["analyze", "mine:net", "--batches", "mine:unlabelled", "--max-drop", "1", *arguments]
    assert main(argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_unlabelled_classifiers_learn_the_float_networks_answers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)).eval()
    found = mpq.qat(network, pictures(), policy(4), epochs=2, settings=SETTINGS)
    assert found.metrics["teachers"] == ["the float network"]
    assert np.isfinite(found.metrics["epochs"])
