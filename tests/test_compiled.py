"""A compiled training step: whole, once, the same training, and nothing of it in the result."""

from __future__ import annotations

import copy
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from mpq import absorb_norms, attach_norms, freeze, policies, prepare, quantize_graph, to_float
from mpq.cli.qat import qat as qat_command
from mpq.cli.train import train as train_command
from mpq.cli.training import check_plan, recipe_from
from mpq.data import Normalization
from mpq.errors import UsageError
from mpq.rundir import Run
from mpq.train.loop import fit
from mpq.train.plan import Hooks, TrainingData, TrainingPlan
from mpq.train.recipe import Recipe

NONE = Normalization.parse("none")
RECIPE = Recipe(epochs=2, batch=32, lr=0.02, flip=False, ema=0.9, dampen=0.001, accumulate=2)


class Small(nn.Module):
    """A convolution with batch norm, an addition and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nets.conv_bn(3, 4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)))
        return self.fc(y.mean((2, 3)))


def student():
    torch.manual_seed(0)
    images = nets.images(16)
    graph = prepare(to_float(Small().eval(), images[:2]), policies.load("w4a8"))
    quantize_graph(graph, images)
    attach_norms(graph, images)
    return graph


def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(96, 12, 12, 3), dtype=np.uint8)
    return images, np.arange(96, dtype=np.int64) % nets.CLASSES


def train(graph, folder: Path, recipe: Recipe, **options):
    data = TrainingData(pictures(), None, NONE)
    hooks = options.pop("hooks", None)
    return fit(graph.module, data, TrainingPlan(recipe), Run(folder, **options), hooks)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_it_trains_as_without_and_is_exported_as_trained(tmp_path: Path):
    eager, made = student(), student()
    expected = train(eager, tmp_path / "eager", RECIPE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train(made, tmp_path / "compiled", RECIPE.override({"compile": True}))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for a, b in zip(expected.history, found.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    assert isinstance(made.module, fx.GraphModule)
    assert list(made.module.state_dict()) == list(eager.module.state_dict())
    images = nets.images(8, seed=1)
    with torch.no_grad():
        trained = made.module(images)
        absorb_norms(made)
        assert torch.equal(made.module(images), trained)
        assert torch.equal(freeze(made).module(images), trained)


def test_a_resumed_compiled_run_is_bit_equal(tmp_path: Path):
    recipe = RECIPE.override({"compile": True})
    whole, broken, fresh = student(), student(), student()
    train(whole, tmp_path / "whole", recipe)

    def stop(epoch: int, step: int, steps: int, loss: float) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, tmp_path / "r", recipe, hooks=Hooks(on_step=stop))
    train(fresh, tmp_path / "r", recipe, resume=True)
    for (name, x), y in zip(
        whole.module.state_dict().items(), fresh.module.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("name", ["depthwise", "transposed"])
def test_steps_are_traced_whole(name: str):
    images = nets.images(8)
    graph = prepare(to_float(nets.build(name), images[:2]), policies.load("w4a8"))
    quantize_graph(graph, images)
    attach_norms(graph, images)
    plain = copy.deepcopy(graph.module).train()
    step = torch.compile(graph.module.train(), backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            out, expected = step(images), plain(images)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            out.square().sum().backward()
            expected.square().sum().backward()
    for (key, a), b in zip(graph.module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=key)


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path):
    from torch._inductor import config, cpp_builder

    def none(search: object) -> str:
        raise cpp_builder.exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: none(config.cpp.cxx))
    message = r"compile needs a C\+\+ compiler such as g\+\+ .*leave --compile"
    with pytest.raises(UsageError, match=message):
        check_plan(RECIPE.override({"compile": True}), device="cpu", teacher=None, unlabelled=None)
    check_plan(RECIPE, device="cpu", teacher=None, unlabelled=None)
    assert recipe_from("qat", 1, ()).compile is False
    shown = CliRunner().invoke(train_command, ["resnet20", "--show-recipe", "--compile"])
    assert shown.exit_code == 0
    assert "compile: true" in shown.output
    with pytest.raises(UsageError, match=message):
        train(student(), tmp_path / "new", RECIPE.override({"compile": True}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [(), ("--compile",)])
def test_the_flag_is_the_recipes_key(flags: tuple[str, ...]):
    done = CliRunner().invoke(train_command, ["resnet20", "--show-recipe", *flags])
    assert done.exit_code == 0
    assert f"compile: {str(bool(flags)).lower()}" in done.output
    assert "--compile" in CliRunner().invoke(qat_command, ["--help"]).output
