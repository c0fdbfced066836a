"""Networks that work in place: the graph means what the model computed, in training and export."""

from __future__ import annotations

import operator

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from nets import Head
from torch import Tensor, fx, nn

from mpq import freeze, prepare, quantize_graph, to_float
from mpq.export import to_onnx
from mpq.policy import Policy


@fx.wrap
def relu_(y: Tensor) -> Tensor:
    """Not torch's, in spite of its name."""
    return F.relu(y) + 1


def by_a_namesake(m: nn.Module, y: Tensor) -> Tensor:
    return relu_(y)


def by_elu(m: nn.Module, y: Tensor) -> Tensor:
    return F.elu_(y)


def by_return(m: nn.Module, y: Tensor) -> Tensor:
    return F.relu_(y)


def by_keyword(m: nn.Module, y: Tensor) -> Tensor:
    return F.relu(y, inplace=True)


def by_position(m: nn.Module, y: Tensor) -> Tensor:
    return F.relu6(y, True)


def by_module(m: nn.Module, y: Tensor) -> Tensor:
    return m.relu(y)


def by_effect(m: nn.Module, y: Tensor) -> Tensor:
    y.relu_()
    return y


def by_effect_of_a_module(m: nn.Module, y: Tensor) -> Tensor:
    m.relu(y)
    return y


def by_method(m: nn.Module, y: Tensor) -> Tensor:
    return y.mul_(2).clamp_(0, 3)


FORMS = [
    by_a_namesake,
    by_elu,
    by_return,
    by_keyword,
    by_position,
    by_module,
    by_effect,
    by_effect_of_a_module,
    by_method,
]


class Overwriting(nn.Module):
    """`a` is overwritten by a form and read again behind `b`."""

    def __init__(self, form) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.head, self.form = nn.ReLU(inplace=True), Head(8), form

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.form(self, y)
        return self.head(self.b(z) + y)


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(form) -> nn.Module:
    torch.manual_seed(0)
    return Overwriting(form).eval()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_the_graph_answers_as_the_model(form):
    model = network(form)
    graph = to_float(model, images(2))
    x = images()
    torch.testing.assert_close(graph.module(x), model(x.clone()))
    assert torch.equal(x, images())
    assert model.relu.inplace  # the model is not changed


def test_operators_of_a_graph_that_overwrite():
    model = fx.symbolic_trace(network(by_keyword))
    (add,) = (n for n in model.graph.nodes if n.target is operator.add)
    add.target = operator.imul
    with model.graph.inserting_after(add):
        add.replace_all_uses_with(late := model.graph.call_function(operator.isub, (add, 0.5)))
    late.args = (add, add.args[0])  # it reads what was overwritten just before
    model.recompile()
    graph = to_float(model, images(2))
    assert {operator.imul, operator.isub}.isdisjoint(n.target for n in graph.module.graph.nodes)
    torch.testing.assert_close(graph.module(images()), model(images()))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_it_trains_and_its_file_answers_as_it_does(form, tmp_path):
    model = network(form)
    graph = prepare(model, Policy.uniform(8), images(2))
    quantize_graph(graph, images(), effort="fast")
    graph.module.train()(images()).square().sum().backward()
    assert all(p.grad is not None for p in graph.module.parameters())
    graph.module.eval()
    to_onnx(graph, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    with torch.no_grad():
        promised, computed = freeze(graph).module(images()), model(images())
    torch.testing.assert_close(torch.from_numpy(found), promised, atol=1e-4, rtol=1e-4)
    assert float((promised - computed).abs().max()) < 0.05 * float(computed.abs().max())


@torch.no_grad()
def test_a_change_through_a_second_name_is_seen():
    def form(m: nn.Module, y: Tensor) -> Tensor:
        y[:, :4].relu_()
        return F.relu(y - 0.1)

    model = network(form)
    torch.testing.assert_close(to_float(model, images(2)).module(images(3)), model(images(3)))


@torch.no_grad()
def test_a_hook_of_a_batch_norm_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Head(8)).eval()
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(to_float(model, images(2)).module(images(3)), model(images(3)))


def test_a_network_that_is_random_in_eval_mode_is_named_and_taken(caplog):
    def form(m: nn.Module, y: Tensor) -> Tensor:
        return F.dropout(F.relu(y))  # training=True is this function's default

    to_float(network(form), images(2))
    assert "Overwriting answers differently each time, also in eval mode" in caplog.text
