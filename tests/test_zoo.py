from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import fx, nn

from mpq import zoo
from mpq.errors import CheckpointError, UsageError
from mpq.userimport import trusting
from mpq.zoo.architectures import ARCHITECTURES
from mpq.zoo.detection import family_key, recognize, template
from mpq.zoo.libraries import torchvision_names
from mpq.zoo.memoryless import WithoutMemory

# Parameters for 10 classes. ResNet: He et al. 2016, table 6 (0.27, 0.46, 0.66, 0.85, 1.7 million);
# the rest: the figures of the papers, which give two or three digits, or of the public code.
PARAMETERS = {
    "resnet8": 75_290,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet8_conv": 78_042,
    "resnet20_conv": 272_474,
    "resnet32_conv": 466_906,
    "resnet44_conv": 661_338,
    "resnet56_conv": 855_770,
    "resnet110_conv": 1_730_714,
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "mobilenet_v2_cifar": 2_296_922,
    "wrn_16_4": 2_748_890,
    "wrn_28_4": 5_849_050,
    "wrn_28_10": 36_479_194,
    "wrn_40_2": 2_243_546,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_190_40": 25_624_430,
    "densenet121_cifar": 6_956_298,
    "resnext29_8x64d": 34_426_698,
}


def _empty(arch: str, classes: int) -> nn.Module:
    """A network without memory for its weights: good for names and shapes."""
    with WithoutMemory():
        return zoo.build(arch, classes)


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameters():
    assert {arch: _count(_empty(arch, 10)) for arch in ARCHITECTURES} == PARAMETERS


def test_parameters_of_resnet18_for_100_classes():
    assert _count(_empty("resnet18_cifar", 100)) == 11_220_132


def test_all_trace_and_take_32x32():
    for arch in ARCHITECTURES:
        network = _empty(arch, 7).to("meta")  # shapes only: the large ones take seconds to compute
        assert not network.training, arch
        logits = fx.symbolic_trace(network)(torch.empty(2, 3, 32, 32, device="meta"))
        assert logits.shape == (2, 7), arch


@pytest.mark.parametrize(
    "arch", ["resnet20", "resnet56_conv", "mobilenet_v2_cifar", "wrn_16_4", "densenet_bc_100_12"]
)
def test_trace_computes_the_same(arch):
    network = zoo.build(arch, 7)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(images)
        traced = fx.symbolic_trace(network)(images)
    assert logits.shape == (1, 7)
    torch.testing.assert_close(traced, logits, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["resnet20", "resnet20_conv", "resnet18_cifar", "resnet50_cifar"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnets_take_small_images_and_other_channels(arch, channels):
    network = zoo.build(arch, 10, in_channels=channels)
    assert network(torch.zeros(1, channels, 16, 16)).shape == (1, 10)


def test_pad_shortcut_takes_every_second_pixel_and_pads_both_sides():
    shortcut = zoo.build("resnet20", 10).get_submodule("layer2.0.downsample")
    x = torch.arange(16 * 16.0).reshape(1, 16, 4, 4)
    out = shortcut(x)
    assert out.shape == (1, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_train_step_reaches_every_parameter():
    network = zoo.build("wrn_16_4", 10).train()
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_names_hold_the_zoo_and_all_torchvision_classifiers():
    names = zoo.names()
    assert len(names) == len(set(names))
    assert {"resnet20", "resnet18", "resnet18_cifar", "mobilenet_v2", "vit_b_16"} <= set(names)
    assert len(torchvision_names()) >= 80


def test_torchvision_names_stay_torchvisions():
    assert _count(_empty("resnet18", 1000)) == 11_689_512
    assert _count(_empty("mobilenet_v2", 1000)) == 3_504_872


def test_a_torchvision_network_runs():
    network = zoo.build("mobilenet_v3_small", 10)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arch", "side"),
    [
        ("resnet20", 32),
        ("resnet50", 224),
        ("inception_v3", 299),
        ("vit_h_14", 224),
        ("efficientnet_b1", 240),
        ("regnet_y_128gf", 224),
        ("swin_v2_t", 256),
    ],
)
def test_input_size(arch, side):
    assert zoo.input_size(arch) == (3, side, side)


@pytest.mark.parametrize("arch", ["resnet21", "mobilenetv2", ""])
def test_unknown_name(arch):
    with pytest.raises(UsageError, match=r"must be a network of the zoo.*Got"):
        zoo.build(arch, 10)
    with pytest.raises(UsageError, match=r"must be a network of the zoo.*Got"):
        zoo.input_size(arch)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean .*resnet20"):
        zoo.build("resnet_20", 10)


def test_bad_numbers():
    with pytest.raises(UsageError, match=r"classes of resnet20 must be at least 1. Got 0"):
        zoo.build("resnet20", 0)
    with pytest.raises(UsageError, match=r"resnet18 .* takes 3 image channels. Got 1"):
        zoo.build("resnet18", 10, in_channels=1)


# Factories


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module in the working directory, under a name that nothing else has."""
    name = "factories_of_a_user"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def sized(classes=4): return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))\n"
        "def numbered(num_classes): return sized(num_classes)\n"
        "def fixed(): return nn.Linear(2, 3)\n"
        "def wrapped(classes):\n"
        "    net = nn.Module()\n"
        "    net.net = sized(classes)\n"
        "    return net\n"
        "def broken(): raise RuntimeError('no such luck')\n"
        "def text(): return 'not a network'\n"
        "fixed.input_size = (1, 28, 28)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    functions = ("sized", "numbered", "fixed", "wrapped", "broken", "text", "size")
    with trusting(*(f"{name}:{function}" for function in functions)):
        yield name
    assert sys.path == before
    sys.modules.pop(name, None)


def test_factory_is_called_with_what_it_takes(factories):
    assert zoo.build(f"{factories}:sized", 9)[1].out_features == 9
    assert zoo.build(f"{factories}:numbered", 9)[1].out_features == 9
    assert zoo.build(f"{factories}:fixed", 9).out_features == 3


def test_factory_may_state_its_input_size(factories):
    assert zoo.input_size(f"{factories}:fixed") == (1, 28, 28)
    assert zoo.input_size(f"{factories}:sized") == (3, 32, 32)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("broken", "must build a network .*RuntimeError: no such luck"),
        ("text", r"must return a torch.nn.Module. Got str"),
        ("size", r"no callable 'size'; did you mean sized\?"),
        ("", r"must be named package\.module:function\. Got 'factories_of_a_user:'"),
    ],
)
def test_bad_factory(factories, attribute, message):
    with pytest.raises(UsageError, match=message):
        zoo.build(f"{factories}:{attribute}", 10)


def test_factory_in_a_module_that_cannot_be_imported():
    name = "no_such_package.module:net"
    importable = pytest.raises(UsageError, match="must be importable from the working directory")
    with trusting(name), importable:
        zoo.build(name, 10)


@pytest.mark.parametrize("module", ["", ".relative"])
def test_factory_in_what_is_no_module(module):
    name = f"{module}:net"
    with trusting(name), pytest.raises(UsageError, match=r"must be named package\.module:function"):
        zoo.build(name, 10)


# Detection


def test_detection_builds_few_networks_and_does_not_depend_on_the_order_of_names():
    state = _empty("mobilenet_v3_large", 5).state_dict()
    shuffled = dict(sorted(state.items()))
    template.cache_clear()
    assert zoo.detect(shuffled) == ("mobilenet_v3_large", 5)
    assert template.cache_info().misses < len(zoo.names()) / 3


def test_detect_every_network_of_the_zoo():
    for arch in ARCHITECTURES:
        assert zoo.detect(_empty(arch, 2).state_dict()) == (arch, 2)
    assert zoo.detect(_empty("resnet20", 1000).state_dict()) == ("resnet20", 1000)


def test_detect_one_of_each_torchvision_family():
    # That the members of a family differ is what test_no_two_architectures... says.
    first = {family_key(arch): arch for arch in reversed(torchvision_names())}
    assert len(first) >= 17
    for arch in first.values():
        assert zoo.detect(_empty(arch, 12).state_dict()) == (arch, 12)


def test_no_two_architectures_share_names_and_shapes():
    shapes = [tuple(sorted(template(arch).shapes.items())) for arch in zoo.names()]
    assert len(shapes) == len(set(shapes))


def test_every_torchvision_network_has_the_tensor_of_its_family():
    lacking = [a for a in torchvision_names() if family_key(a) not in template(a).shapes]
    assert lacking == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "net."])
def test_detect_through_prefixes(prefix):
    state = _empty("resnet20", 10).state_dict()
    assert zoo.detect({prefix + k: v for k, v in state.items()}) == ("resnet20", 10)


def test_counters_of_other_tools_do_not_matter():
    state = _empty("resnet20", 10).state_dict()
    state = {k: v for k, v in state.items() if "num_batches" not in k}
    state["conv1.total_ops"] = torch.zeros(1)
    assert zoo.detect(state) == ("resnet20", 10)


@pytest.mark.parametrize("arch", [None, "resnet18_cifar"])
def test_another_spelling_is_renamed(arch):
    network = zoo.build("resnet18_cifar", 100)
    state = network.state_dict()
    other = {
        k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in state.items()
    }
    found = recognize(other, arch)
    assert (found.arch, found.classes, found.input) == ("resnet18_cifar", 100, (3, 32, 32))
    assert not found.network.training
    own = found.network.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if "num_batches" not in k)


def test_old_spelling_of_densenet():
    state = _empty("densenet121", 10).state_dict()
    old = {
        k.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for k, v in state.items()
    }
    assert old.keys() != state.keys()
    assert zoo.detect(old) == ("densenet121", 10)


def test_auxiliary_heads_are_dropped():
    state = dict(_empty("googlenet", 10).state_dict())
    state["aux1.fc2.weight"] = torch.zeros(10, 1024)
    assert zoo.detect(state) == ("googlenet", 10)


def test_a_size_that_nobody_says_is_told(factories, caplog):
    state = zoo.build(f"{factories}:wrapped", 5).state_dict()
    assert recognize(state, f"{factories}:wrapped").input == (3, 32, 32)
    assert "wrapped does not say the size of its images: 3,32,32 is taken" in caplog.text
    caplog.clear()
    assert recognize(state, f"{factories}:wrapped", size=(48, 40)).input == (3, 48, 40)
    assert not caplog.text


def test_the_prefix_of_a_factorys_network_may_differ(factories):
    network = zoo.build(f"{factories}:wrapped", 5)
    state = {k.replace("net.", "module."): v for k, v in network.state_dict().items()}
    assert state.keys() != network.state_dict().keys()
    found = recognize(state, f"{factories}:wrapped")
    assert found.classes == 5
    assert torch.equal(found.network.net[1].weight, network.net[1].weight)
    with pytest.raises(
        CheckpointError, match=r"must be those of .*:wrapped, but differ: 1 missing"
    ):
        recognize({"0.weight": torch.zeros(1)}, f"{factories}:wrapped")


def test_no_match_names_the_nearest_and_what_differs():
    state = dict(_empty("resnet32", 10).state_dict())
    state["conv1.weight"] = torch.zeros(24, 3, 3, 3)
    del state["layer1.0.bn1.bias"]
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        zoo.detect(state)
    message = str(caught.value)
    for part in (
        "Nearest: resnet32: 1 missing (layer1.0.bn1.bias)",
        "1 not expected (extra.weight)",
        "conv1.weight is [24, 3, 3, 3], must be [16, 3, 3, 3]",
        "--model NAME",
        "--model package.module:factory",
    ):
        assert part in message


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(())}, {"fc.weight": torch.zeros(3, 2)}])
def test_no_match_for_odd_states(state):
    with pytest.raises(CheckpointError, match=r"fit none. Nearest: "):
        zoo.detect(state)


def test_a_match_is_logged_and_so_is_an_ambiguity(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "mpq.zoo.detection")
    state = _empty("wrn_16_4", 10).state_dict()
    assert zoo.detect(state) == ("wrn_16_4", 10)
    assert "fits wrn_16_4 with 10 classes" in caplog.text
    twice = {**ARCHITECTURES, "wrn_16_4_other_strides": ARCHITECTURES["wrn_16_4"]}
    monkeypatch.setattr("mpq.zoo.detection.ARCHITECTURES", twice)
    monkeypatch.setattr("mpq.zoo.builder.ARCHITECTURES", twice)
    assert zoo.detect(state) == ("wrn_16_4", 10)
    assert "fits wrn_16_4, taken, but also wrn_16_4_other_strides" in caplog.text
    template.cache_clear()
