"""Blocks, the memory bound, and learned rounding: what it wins, and that it resumes bit for bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from nets import NETS, build, images
from torch import nn

from mpq import zoo
from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.policy import Policy
from mpq.ptq import FinishedBlocks, Learning, calibrate, quantize_graph, quantize_layers
from mpq.ptq import blockwise as blockwise_module
from mpq.ptq.blocks import blocks
from mpq.ptq.blockwise import PROGRESS, BlockLearner
from mpq.ptq.soft import SoftLayer
from mpq.ptq.store import SMALL, ActivationStore
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer

BRIEF = Learning(iterations=6, batch=8)


def prepared(name: str, *bits: int) -> QuantGraph:
    return prepare(to_float(build(name), images(2)), Policy.uniform(*bits))


@pytest.mark.parametrize("name", NETS)
def test_blocks_cut_a_graph_where_one_tensor_is_alive(name: str) -> None:
    module = prepared(name, 8).module
    nodes = list(module.graph.nodes)
    found = blocks(module)
    assert [n for b in found for n in b.nodes] == nodes
    for block in found:
        inside = set(block.nodes)
        read = {a for n in block.nodes for a in n.all_input_nodes} - inside
        assert {n for n in read if n.op != "get_attr"} <= {block.entry}
        seen = {n for n in block.nodes if any(u not in inside for u in n.users)}
        assert {n for n in seen if n.op != "get_attr"} <= {block.exit}


def test_a_residual_block_is_one_block_and_a_chain_is_cut_in_threes() -> None:
    assert [b.layers for b in blocks(prepared("residual", 8).module)] == [
        (),
        ("conv1",),
        ("conv2", "conv3"),
        ("head.2",),
    ]
    chain = nn.Sequential(*(m for _ in range(7) for m in (nn.Conv2d(3, 3, 1), nn.ReLU())))
    graph = prepare(to_float(chain, images(2)), Policy.uniform(8))
    assert [len(b.layers) for b in blocks(graph.module)] == [0, 3, 3, 1]


class Answering(nn.Module):
    """Answers with what it computes on the way, and with a head on it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6))
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        early = self.convs[1](torch.relu(self.convs[0](x)))
        side, y = self.head(early), torch.relu(early)
        for conv in self.convs[2:]:
            y = torch.relu(conv(y))
        return {"early": early, "side": side, "late": y}


def test_what_is_answered_on_the_way_ends_no_learning() -> None:
    graph = prepare(to_float(Answering(), images(2)), Policy.uniform(4, 8))
    learned = [b.layers for b in blocks(graph.module) if b.entry is not None and b.exit is not None]
    assert sum(learned, ()) == tuple(graph.layers)
    before = {
        name: m.weight.clone() for name, m in graph.module.named_modules() if name in graph.layers
    }  # type: ignore[union-attr]
    quantize_graph(graph, images(32), effort="best", learning=BRIEF)
    assert all(not torch.equal(graph.module.get_submodule(n).weight, w) for n, w in before.items())


class CountsItsSamples(nn.Module):
    """Flattens by the number of its inputs, as efficientnet_pytorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(m for _ in range(6) for m in (nn.Conv2d(3, 3, 1), nn.ReLU())), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples = x.size(0)
        return self.head(self.convs(x).view(samples, -1))


def test_the_number_of_samples_joins_no_blocks_and_is_that_of_the_batch_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(QuantGraph, "batch", lambda graph: 10)
    graph = prepare(to_float(CountsItsSamples(), images(2)), Policy.uniform(2, 8))
    assert [len(b.layers) for b in blocks(graph.module)] == [0, 3, 3, 1]
    calibrate(graph, images(30))
    learner = BlockLearner(BRIEF)
    quantize_layers(graph, images(30), learner=learner)
    assert len(learner.ratios) == 3


@pytest.mark.parametrize("effort", ["good", "best"])
def test_what_lies_on_disk_changes_nothing(effort: str) -> None:
    batch, states = images(160), []
    for memory in (1000.0, 0.0):
        graph = prepared("residual", 4, 8)
        quantize_graph(graph, batch, effort=effort, learning=BRIEF, memory_mb=memory)  # type: ignore[arg-type]
        states.append(graph.module.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_shelf_keeps_to_its_budget_and_leaves_nothing_behind() -> None:
    x = torch.randn(SMALL, generator=torch.Generator().manual_seed(0)).reshape(64, -1)
    size = x.numel() * 4
    with ActivationStore(2 * size) as store:
        kept = [store.put((x + k, 3)) for k in range(4)]
        assert store.used == 2 * size
        assert store.written == 2
        folder = Path(store.folder.name)  # type: ignore[union-attr]
        assert len(list(folder.iterdir())) == 2
        for k, one in enumerate(kept):
            value, number = one.get()
            assert number == 3
            assert torch.equal(value, x + k)
        last = store.put(x)
        assert torch.equal(last.rows(torch.tensor([5, 2])), x[[5, 2]])
        kept[0].drop()
        kept[3].drop()
        assert store.used == size
        assert len(list(folder.iterdir())) == 2
    assert not folder.exists()


def test_a_batch_shrinks_with_the_size_of_its_activations() -> None:
    small = to_float(build("plain"), images(2))
    large = to_float(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), torch.zeros(1, 3, 112, 112))
    assert small.batch() == 128
    assert large.batch() == 8 * 2**20 // (4 * 8 * 112 * 112)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [(4, 4), (2, 8)])
def test_learning_works_on_everything_that_the_passes_take(
    name: str, bits: tuple[int, int]
) -> None:
    batch = images(24, seed=3)
    graph = quantize_graph(prepared(name, *bits), batch, effort="best", learning=BRIEF)
    got = graph.module(batch)
    assert bool(got.isfinite().all())
    assert torch.equal(freeze(graph).module(batch), got)
    for module in graph.module.modules():
        assert not isinstance(module, (QuantLayer, FakeQuant)) or not module.training


def test_learning_lowers_the_error_of_a_block_and_never_raises_it() -> None:
    """On images that were held out of the learning; a block that gains nothing is put back."""
    batch = images(256, seed=1)
    graph = prepared("residual", 2, 8)
    calibrate(graph, batch)
    learner = BlockLearner(Learning(iterations=120))
    quantize_layers(graph, batch, learner=learner)
    assert set(learner.ratios) == {"conv1", "conv2", "head.2"}
    assert learner.ratios["conv2"] < 0.9
    assert max(learner.ratios.values()) <= 1


def test_a_block_that_gets_worse_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, states, harden = images(64, seed=1), [], SoftLayer.harden

    def spoil(soft: SoftLayer) -> None:
        soft.log_ratio.data += 0.5
        harden(soft)

    monkeypatch.setattr(SoftLayer, "harden", spoil)
    for effort in ("good", "best"):
        graph = prepared("residual", 4, 4)
        quantize_graph(graph, batch, effort=effort, learning=BRIEF)  # type: ignore[arg-type]
        states.append(graph.module.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_soft_weights_begin_where_sequential_rounding_stopped_and_end_on_the_grid() -> None:
    graph = quantize_graph(prepared("plain", 3, 8), images(16))
    layer = next(m for m in graph.module.modules() if isinstance(m, QuantLayer))
    before, step = layer.integers().clone(), layer.step()[:, None, None, None]
    soft = SoftLayer(layer, layer.weight.detach() + 0.7 * step)
    assert torch.equal(soft.integers().detach(), before.float())
    soft.harden()
    assert torch.equal(layer.integers(), before)
    assert soft.reals is not None
    soft.integers().sum().backward()  # type: ignore[no-untyped-call]
    assert bool((soft.reals.grad == 1).any())
    with torch.no_grad():
        soft.reals += 0.1  # those that lie just below the next integer cross over
    soft.harden()
    assert 0 < float((layer.integers() - before).abs().max()) <= 1
    assert torch.allclose(layer.weight, layer.integers() * step)


def run(state: Path, *, resume: bool = False, learning: Learning = BRIEF) -> QuantGraph:
    graph = prepared("residual", 4, 4)
    finished = FinishedBlocks(state, {"policy": "w4a4"}, resume=resume)
    return quantize_graph(graph, images(32), effort="best", learning=learning, finished=finished)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_is_resumed_bit_for_bit(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole.pth").module.state_dict()
    calls: Counter[str] = Counter()
    real = blockwise_module.learn_block

    def interrupted(*args, **kwargs):
        calls["learned"] += 1
        if calls["learned"] > stop:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    state = tmp_path / PROGRESS
    monkeypatch.setattr(blockwise_module, "learn_block", interrupted)
    if stop < 3:
        with pytest.raises(KeyboardInterrupt):
            run(state)
    else:
        run(state)
    monkeypatch.setattr(blockwise_module, "learn_block", real)
    resumed = run(state, resume=True).module.state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_stopped_after_any_block_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Also where nothing is learned: what bias correction added to an output is added again.

    At 8 bits one value in millions lies so near a rounding boundary that the last bit of a shifted
    output decides; among these images are such values.
    """
    torch.manual_seed(0)
    network, batch = zoo.build("resnet8", 10).train(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 16, 16))
    calibration = torch.randn(96, 3, 16, 16, generator=batch)
    floats = to_float(network.eval(), calibration[:2])
    state = tmp_path / PROGRESS

    def quantized(*, resume: bool) -> dict[str, torch.Tensor]:
        finished = FinishedBlocks(state, resume=resume)
        graph = prepare(floats, Policy.uniform(8))
        quantize_graph(graph, calibration, effort="best", learning=BRIEF, finished=finished)
        return graph.module.state_dict()

    whole = quantized(resume=False)
    content = torch.load(state, weights_only=True)
    assert len(content["blocks"]) == 6
    for done in range(1, 6):
        torch.save(content | {"blocks": content["blocks"][:done]}, state)
        resumed = quantized(resume=True)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items()), done


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    state = tmp_path / PROGRESS
    run(state)
    with pytest.raises(UsageError, match=r"must be of the same run to be resumed, but learning"):
        run(state, resume=True, learning=Learning(iterations=7, batch=8))
    torch.save({"format": "something"}, state)
    with pytest.raises(UsageError, match="must hold the finished blocks"):
        run(state, resume=True)
