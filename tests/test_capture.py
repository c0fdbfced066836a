"""Recording a network: what enters the graph, what stays free, and what is refused."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from mpq.capture.capture import Captured, capture
from mpq.capture.network import Network
from mpq.capture.replay import apart
from mpq.errors import GraphError


class Net(nn.Module):
    """A convolution, and a forward from a function of it and the arguments."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)
        self.way = [forward]  # in a list, so that it is no method
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.way[0](self, *args, **kwargs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(forward: Callable[..., Any], **parts: nn.Module) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(forward, **parts).eval()


def take(forward: Callable[..., Any], *shape: int, **parts: nn.Module) -> tuple[Net, Captured]:
    model = net(forward, **parts)
    return model, capture(Network(model, (draw(*(shape or (2, 3, 8, 8))),)))


@torch.no_grad()
def check(model: nn.Module, captured: Captured, *shapes: tuple[int, ...]) -> None:
    """The graph answers as the model does, on new noise of several sizes, and again."""
    for seed, shape in enumerate((*shapes, *shapes), start=5):
        x = draw(*shape, seed=seed)
        assert not apart(copy.deepcopy(model)(x.clone()), captured.module(x.clone()))


def vocabulary(graph: fx.GraphModule) -> list[tuple[str, str, str]]:
    return [(n.op, n.name, str(n.target)) for n in graph.graph.nodes]


# -- what enters the graph ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(nets.NETS.keys() - {"island", "shuffle", "attention"}))
def test_nodes_are_named_as_symbolic_trace_names_them(name: str):
    model = nets.build(name)
    found = capture(Network(model, (nets.images(),))).module
    assert vocabulary(found) == vocabulary(fx.symbolic_trace(model))


def test_operators_are_pythons_whoever_wrote_them_how():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = 1 - m.conv(x) / 2 + x.mean()
        y += 1
        y *= y
        return (-(2**y) // 3) % 2 + 1 / (y > 0).float().add(1)

    model, captured = take(forward)
    plain = fx.symbolic_trace(_Free(model))
    assert [n[1] for n in vocabulary(captured.module)] == [n[1] for n in vocabulary(plain)]
    check(model, captured, (3, 3, 8, 8))


class _Free(nn.Module):
    """A `Net` with the signature that symbolic tracing can read."""

    def __init__(self, model: Net) -> None:
        super().__init__()
        self.conv, self.fc, self.way = model.conv, model.fc, model.way

    def forward(self, arg_0: Tensor) -> Any:
        return self.way[0](self, arg_0)


def test_modules_that_the_forward_makes_are_recorded():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = nn.Sequential(nn.ReLU6(), nn.AdaptiveAvgPool2d(1))(m.conv(x))
        return m.fc(nn.Flatten()(nn.Dropout(0.5)(y)) if m.training else nn.Flatten()(y))

    model, captured = take(forward)
    check(model, captured, (1, 3, 8, 8), (5, 3, 8, 8))


def test_what_a_users_hook_does_is_recorded():
    model = net(lambda m, x: m.conv(x))
    model.conv.register_forward_hook(lambda module, args, out: 2 * out)
    captured = capture(Network(model, (draw(2, 3, 8, 8),)))
    assert "conv" not in {n.target for n in captured.module.graph.nodes if n.op == "call_module"}
    check(model, captured, (3, 3, 8, 8))


def test_a_padding_that_no_convolution_has_is_a_step_of_its_own():
    reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    model, captured = take(lambda m, x: m.reflect(m.conv(x)), reflect=reflect)
    functions = [n.target for n in captured.module.graph.nodes if n.op == "call_function"]
    assert functions == [F.pad, F.conv2d]
    check(model, captured, (3, 3, 8, 8))


def test_a_loop_over_rows_and_unpacking_are_items():
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k = m.conv(x).unflatten(1, (2, 4)).transpose(0, 1)
        return sum(row for row in torch.stack((q, k, q * k)))

    model, captured = take(forward)
    check(model, captured, (1, 3, 8, 8), (5, 3, 8, 8))


# -- sizes -------------------------------------------------------------------------------------


def by_shape(m: Net, x: Tensor) -> Tensor:
    n, c, h, w = m.conv(x).shape
    return m.conv(x).view(n, 2, c // 2, h * w).transpose(1, 2).reshape(n, c, h, w)[:, : c // 2]


def by_size(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y.view(y.size(0), -1).mean(1, keepdim=True) + y.new_zeros(y.size(dim=0), 1)


def by_interpolation(m: Net, x: Tensor) -> Tensor:
    small = F.max_pool2d(m.conv(x), 2)
    return F.interpolate(small, size=x.shape[-2:], mode="nearest") * (x.numel() / x.shape[0])


def by_padding(m: Net, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    ph, pw = -h % 3, math.ceil(w / 3) * 3 - w
    return F.pad(m.conv(x), (0, pw, 0, ph))


def by_making(m: Net, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    grid = torch.arange(h, device=x.device)[:, None] + torch.linspace(-1, 1, w)
    return m.conv(x) * grid + torch.zeros(n, 1, 1, 1, device=x.device)


@pytest.mark.parametrize("forward", [by_shape, by_size, by_interpolation, by_padding, by_making])
def test_batch_height_and_width_stay_free(forward: Callable[..., Any]):
    model, captured = take(forward)
    check(model, captured, (1, 3, 8, 8), (7, 3, 8, 8), (3, 3, 10, 12))


def test_what_is_made_lives_where_the_input_lives():
    _, captured = take(by_making)
    made = [n for n in captured.module.graph.nodes if "device" in n.kwargs]
    assert made
    assert all(n.kwargs["device"].args[1] == "device" for n in made)


def test_sizes_that_chose_a_branch_are_told():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        if y.shape[-1] > 4:
            y = F.max_pool2d(y, 2)
        return y / math.sqrt(y.shape[-1])

    _, captured = take(forward)
    assert any("if y.shape[-1] > 4:` is True" in text for text in captured.frozen)
    assert any("math.sqrt" in text and "plain number" in text for text in captured.frozen)
    assert not any(n.target is torch.gt for n in captured.module.graph.nodes)


def test_a_branch_on_the_batch_is_refused():
    def forward(m: Net, x: Tensor) -> Tensor:
        if x.shape[0] == 2:
            return m.conv(x)
        return -m.conv(x)

    message = (
        r"on input \[3, 3, 8, 8\] .* apart \(.*test_capture.py:\d+: `if x.shape\[0\] == 2:` go"
    )
    with pytest.raises(GraphError, match=message):
        take(forward)


def test_a_batch_that_became_a_number_is_refused():
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.conv(x).view(int(x.shape[0]), -1)

    with pytest.raises(GraphError, match=r"int\(x.shape\[0\]\), -1\)` reads a size as a plain"):
        take(forward)


def test_code_that_cannot_be_seen_is_refused():
    @torch.jit.script
    def unseen(x: Tensor) -> Tensor:
        return x * 2

    with pytest.raises(GraphError, match=r"must answer as the network does.*unseen.*constant"):
        take(lambda m, x: m.conv(x) + unseen(x).mean())


# -- values ------------------------------------------------------------------------------------


def asks_bool(m: Net, x: Tensor) -> Tensor:
    return m.conv(x) if x.mean() > 0 else x


def asks_item(m: Net, x: Tensor) -> Tensor:
    return m.conv(x) * x.max().item()


def asks_list(m: Net, x: Tensor) -> Tensor:
    return m.conv(x) * max(x.flatten().tolist())


def asks_numpy(m: Net, x: Tensor) -> Tensor:
    return m.conv(x) + float(x.numpy().max())


def asks_equal(m: Net, x: Tensor) -> Tensor:
    return m.conv(x) if torch.equal(x, x + 1) else x


@pytest.mark.parametrize("forward", [asks_bool, asks_item, asks_list, asks_numpy, asks_equal])
def test_a_value_that_depends_on_the_input_is_refused(forward: Callable[..., Any]):
    message = r"Net.forward must be the same for every input, but .*test_capture.py:\d+: `return m"
    with pytest.raises(GraphError, match=message) as caught:
        take(forward)
    assert "torch.where" in str(caught.value)


def test_values_of_constants_and_weights_may_be_asked():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x) * torch.tensor([1.0, 2.0]).max().item()
        if m.fc.weight.sum() < 1e9:
            y = y + torch.arange(8).view(1, 8, 1, 1)
        return y if (torch.ones(x.shape[0]) > 0).all() else x

    model, captured = take(forward)
    check(model, captured, (3, 3, 8, 8))


# -- memory ------------------------------------------------------------------------------------


def writes_items(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 0] = 0.0
    y[:, 1:3] = x[:, :2]
    return y


def writes_parts(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, 1:5][:, 0].mul_(0.1)
    y[:, 5:].relu_()
    return y


def writes_under_a_second_name(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    z, flat = y, y.flatten(2)
    y += 1
    return z * 2 + flat.mean(2)[:, :, None, None]


def writes_apart(m: Net, x: Tensor) -> Tensor:
    a, b = m.conv(x).chunk(2, 1)
    F.relu_(a)
    return torch.cat((a, b), 1)


def writes_a_new_tensor(m: Net, x: Tensor) -> Tensor:
    y = torch.zeros(1, 4)
    y[:, 1] = m.fc(m.conv(x).mean((2, 3))).mean()
    return m.conv(x).mean((2, 3)) @ y.expand(8, 4)


def writes_by_module(m: Net, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = y[:, :4]
    m.relu(y)
    return z.sum(1) + y.mean(1)


WRITERS = [writes_items, writes_parts, writes_under_a_second_name, writes_apart,
           writes_a_new_tensor, writes_by_module]  # fmt: skip


@pytest.mark.parametrize("forward", WRITERS)
def test_what_is_overwritten_is_a_new_value(forward: Callable[..., Any]):
    model, captured = take(forward, relu=nn.ReLU(inplace=True))
    check(model, captured, (1, 3, 8, 8), (3, 3, 8, 8))


def test_overwritten_memory_that_cannot_be_read_again_is_refused():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        a, b = y.chunk(2, 1)
        y += 1
        return a * b

    with pytest.raises(GraphError, match=r"`return a \* b` \(a tensor is read whose memory was"):
        take(forward)


def test_a_bare_detector_of_torchvision_is_told_what_to_do():
    members = {"__module__": "torchvision.models.detection.ssd", "eager_outputs": None}
    detector = type("SSD", (nn.Module,), members)()
    with pytest.raises(GraphError, match=r"SSD of torchvision takes a list of images.*detection"):
        capture(Network(detector, (torch.rand(1, 3, 8, 8),)))


def test_buffers_are_left_as_they_were():
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.conv(x)
        m.seen += 1
        m.mean = 0.9 * m.mean + 0.1 * y.mean((0, 2, 3))
        return y - m.mean[:, None, None]

    model = net(forward)
    model.register_buffer("seen", torch.zeros(()))
    model.register_buffer("mean", torch.zeros(8))
    captured = capture(Network(model, (draw(2, 3, 8, 8),)))
    assert model.seen == 0
    assert torch.equal(model.mean, torch.zeros(8))
    assert torch.equal(captured.module.mean, torch.zeros(8))


# -- what is captured --------------------------------------------------------------------------


def test_the_network_is_not_changed():
    model = nets.build("residual").train()
    state, before = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    captured = capture(Network(model, (nets.images(),)))
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in captured.module.parameters()}
    assert torch.equal(torch.random.get_rng_state(), before)


def wrapped(model: nn.Module) -> list[nn.Module]:
    inner = nn.Sequential(OrderedDict(body=nn.DataParallel(model)))
    return [nn.DataParallel(model), torch.compile(model), inner, nn.DataParallel(inner)]


@pytest.mark.parametrize("index", range(4))
def test_wrappers_are_opened(index: int):
    model = nets.build("plain")
    captured = capture(Network(wrapped(model)[index], (nets.images(),)))
    assert not any("module." in str(n.target) for n in captured.module.graph.nodes)
    assert not any("_orig_mod" in str(n.target) for n in captured.module.graph.nodes)
    check(model, captured, (3, 3, 12, 12))


class Compiles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        step: Callable[[Tensor], Tensor] = torch.compile(F.relu, backend="eager")
        return step(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("loaded", [True, False])
def test_what_a_forward_compiles_runs_as_written(loaded: bool, monkeypatch: pytest.MonkeyPatch):
    if loaded:
        importlib.import_module("torch._dynamo")
    else:  # as in every command: nothing that it needs loads the compiler
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    compiler, model = torch.compile, Compiles().eval()
    captured = capture(Network(model, (nets.images(),)))
    assert torch.compile is compiler
    check(model, captured, (3, 3, 12, 12))


class Centred(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean((1, 2, 3), keepdim=True)


def centred(conv: nn.Module) -> nn.Module:
    parametrize.register_parametrization(conv, "weight", Centred())
    return conv


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrization": centred,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_computed_weights_become_plain(maker: Callable[..., Any], used: bool, caplog: Any):
    model = net(lambda m, x: m.fc(m.conv(x).mean((2, 3))))
    maker(model.conv)
    model.eval()
    if used:
        model(draw(2, 3, 8, 8))
    with caplog.at_level("INFO", logger="mpq"):
        captured = capture(Network(model, (draw(2, 3, 8, 8),)))
    assert "conv.weight is computed by" in caplog.text
    assert isinstance(captured.module.conv.weight, nn.Parameter)
    assert list(captured.module.conv.state_dict()) in (["weight", "bias"], ["bias", "weight"])
    x = draw(3, 3, 8, 8, seed=3)
    with torch.no_grad():
        expected = model(x)  # the original still works
        torch.testing.assert_close(captured.module(x), expected)


def test_a_network_that_keeps_a_feature_map_is_copied():
    def forward(m: Net, x: Tensor) -> Tensor:
        m.feature = F.relu(m.conv(x))
        return m.fc(m.feature.mean((2, 3)))

    model = net(forward)
    model(draw(2, 3, 8, 8))
    assert model.feature.grad_fn is not None
    captured = capture(Network(model, (draw(2, 3, 8, 8),)))
    x = draw(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(captured.module(x), model(x))


def test_a_network_that_cannot_be_copied_is_refused():
    model = net(lambda m, x: m.conv(x))
    model.log = (line for line in "abc")
    with pytest.raises(GraphError, match=r"Net must be a network that copy.deepcopy can copy.*gen"):
        capture(Network(model, (draw(2, 3, 8, 8),)))


def test_an_encoder_layer_is_opened_down_to_its_products():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model, captured = take(lambda m, x: m.encoder(m.conv(x).flatten(2).mT), encoder=encoder)
    paths = [n.target for n in captured.module.graph.nodes if n.op == "call_module"]
    assert [p for p in paths if "in_proj" in p or "linear" in p] == [
        "encoder.layers.0.self_attn.in_proj",
        "encoder.layers.0.linear1",
        "encoder.layers.0.linear2",
    ]
    check(model, captured, (3, 3, 8, 8))


def test_attention_whose_weights_are_read():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(m: Net, x: Tensor) -> Any:
        t = m.conv(x).flatten(2).transpose(1, 2)
        return m.attention(t, t, t)

    model, captured = take(forward, attention=attention)
    assert "attention.in_proj" in {n.target for n in captured.module.graph.nodes}
    check(model, captured, (3, 3, 8, 8))


# -- arguments and answers ---------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.conv(x) * scale
        return self.fc((y if mask is None else y * mask).mean((2, 3)))


def test_arguments_without_tensors_are_constants():
    model = Optional().eval()
    captured = capture(Network(model, (draw(2, 3, 8, 8),)))
    assert [n.name for n in captured.module.graph.nodes if n.op == "placeholder"] == ["x"]
    assert {"argument mask=None", "argument scale=2.0"} <= set(captured.frozen)
    network = Network(model, (draw(2, 3, 8, 8),), {"mask": draw(2, 1, 6, 6), "scale": 3.0})
    captured = capture(network)
    assert [n.name for n in captured.module.graph.nodes if n.op == "placeholder"] == ["x", "mask"]
    with torch.no_grad():
        found = captured.module(*network.inputs.values())
        torch.testing.assert_close(found, model(*network.args, **network.kwargs))


def test_nestings_of_tensors_go_in_and_come_out():
    def forward(m: Net, pair: Any, *, other: Tensor, names: tuple[str, ...] = ("a",)) -> Any:
        y = m.conv(pair["l"][0]) + pair["r"]
        return OrderedDict(z=y, none=None, count=3, both=[y + other, (y, pair["r"])])

    model = net(forward)
    network = Network(
        model, ({"l": [draw(2, 3, 8, 8)], "r": draw(2, 8, 8, 8)},), {"other": draw(2, 8, 1, 1)}
    )
    captured = capture(network)
    with torch.no_grad():
        found = captured.module(*network.inputs.values())
    assert list(found) == ["z", "none", "count", "both"]
    assert (found["none"], found["count"]) == (None, 3)
    assert not apart(model(*network.args, **network.kwargs), found)


def test_an_example_that_does_not_fit_is_refused():
    model = Optional()
    with pytest.raises(GraphError, match=r"must fit Optional.forward\(x: .*got an unexpected.*'y'"):
        Network(model, (draw(2, 3, 8, 8),), {"y": 1})
    with pytest.raises(GraphError, match=r"must hold a tensor. Got none"):
        Network(model, (3,))
    with pytest.raises(
        GraphError, match=r"must run on an input of shape \[4, 8, 8\] but fails: .*4"
    ):
        capture(Network(model, (draw(2, 4, 8, 8),)))


def test_a_replay_notices_what_is_wrong():
    one = {"a": torch.ones(2, 3), "b": torch.arange(3)}
    assert apart(one, copy.deepcopy(one)) == ""
    assert "2 parts instead of 1" not in apart(one, one)
    assert apart(one, {"a": torch.ones(2, 3)}) == "the answer has 1 parts instead of 2"
    assert apart(one, one | {"a": torch.ones(2, 4)}) == (
        "it answers with shape [2, 4] instead of [2, 3]"
    )
    assert apart(one, one | {"a": torch.ones(2, 3) * 1.01}).endswith("of the largest value apart")
    assert apart(one, one | {"b": torch.arange(3) + 1}) == "an answer of whole numbers differs"
    assert apart({"a": 1}, {"a": 2}) == "it answers 2 instead of 1"
