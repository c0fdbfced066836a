"""What runs on an accelerator mixes no CPU tensor in on the way: seen on tensors without values.

The device `meta` stands for the accelerator, and every operation is looked at: a CPU tensor (but a
scalar, which CUDA takes) together with one of the device is what CUDA would
refuse. So no GPU is needed to find the place.
"""

from __future__ import annotations

from typing import Any

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpq import attach_norms, policies, prepare, quantize_graph, to_float
from mpq.graph.redundant import drop_redundant_relus
from mpq.train import augment
from mpq.train.augment import mix
from mpq.train.objective import Objective
from mpq.train.optim import Ema, build_optimizer
from mpq.train.recipe import Recipe
from mpq.train.whiten import whiten_first_layer
from mpq.zoo import build

CLASSES, COUNT = 10, 8
TRANSFERS = ("aten::_to_copy", "aten::copy_")


class OneDevice(TorchDispatchMode):
    """Refuse operations over tensors of the CPU and of the accelerator together."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in tensors if t.ndim or t.device.type != "cpu"}
        name = func.name().partition(".")[0]
        assert len(kinds) < 2 or name in TRANSFERS, f"{func} mixes {sorted(kinds)}"
        return func(*args, **(kwargs or {}))


def cuda_images() -> Tensor:
    return torch.empty(COUNT, 32, 32, 3, dtype=torch.uint8, device="meta")


def on_meta(module: nn.Module) -> nn.Module:
    """The module there, quantizers and all."""
    return module.to("meta")


def test_a_mixture_of_devices_is_seen() -> None:
    with OneDevice(), pytest.raises(AssertionError, match=r"convolution.* mixes \['cpu', 'meta'\]"):
        nn.functional.conv2d(torch.empty(1, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(erase=0.5),
        Recipe(mixup=0.4, cutmix=1.0),
        Recipe(alternate=True),
    ],
    ids=["plain", "erase", "mixed", "alternate"],
)
def test_augmentation_stays_on_the_device(recipe: Recipe) -> None:
    rng = np.random.default_rng(0)
    labels = torch.empty(COUNT, dtype=torch.int64, device="meta")
    sides = torch.empty(COUNT, dtype=torch.bool, device="meta")
    mirrored = sides if recipe.alternate else None
    with OneDevice():
        images = augment.augment(cuda_images(), recipe, rng, mirrored)
        images, targets = mix(images, labels, recipe, rng)
        targets_there = targets.for_classes(CLASSES)
    assert images.device.type == "meta"
    assert images.shape == (COUNT, 3, 32, 32)
    assert targets_there.device.type == "meta"


@pytest.mark.parametrize(
    "weighting", ["mean", "vote", "entropy", "confidence", "gradient", "dynamic"]
)
@pytest.mark.parametrize("distill", ["kd", "standardized", "dist"])
def test_losses_stay_on_the_device(weighting: str, distill: str) -> None:
    recipe = Recipe.model_validate({"weighting": weighting, "distill": distill})
    student = torch.empty(COUNT, CLASSES, device="meta", requires_grad=True)
    teachers = torch.empty(3, COUNT, CLASSES, device="meta", dtype=torch.bfloat16)
    labels = torch.empty(COUNT, dtype=torch.int64, device="meta")
    with OneDevice():
        parts = Objective(recipe)(student, teachers, labels, progress=0.5)
        parts.loss.backward()
    assert student.grad is not None
    assert student.grad.device.type == "meta"


def step(network: nn.Module, whole: nn.Module, images: Tensor) -> None:
    """Forward, backward, optimizer and average, as in training."""
    optimizer, ema = build_optimizer(whole, Recipe()), Ema(whole, 0.99)
    with OneDevice():
        network(images.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        ema.update(whole)
    assert {p.grad.device.type for p in whole.parameters() if p.grad is not None} == {"meta"}


@pytest.mark.parametrize("arch", ["resnet20", "mobilenet_v2_cifar", "wrn_16_4", "resnet8_conv"])
def test_a_float_step_stays_on_the_device(arch: str) -> None:
    network = on_meta(build(arch, CLASSES)).train()
    step(network, network, torch.empty(COUNT, 3, 32, 32, device="meta"))


@pytest.mark.parametrize("policy", ["w8a8", "w4a8", "w16a16"])
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_a_quantized_step_stays_on_the_device(name: str, policy: str) -> None:
    images = nets.images(8)
    graph = prepare(to_float(nets.build(name), images[:2]), policies.load(policy))
    quantize_graph(graph, images)
    attach_norms(graph, images)
    narrow = drop_redundant_relus(graph.module.train())
    step(on_meta(narrow), narrow, torch.empty_like(images, device="meta"))


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_a_quantized_network_is_evaluated_on_the_device(name: str) -> None:
    images = nets.images(8)
    graph = prepare(to_float(nets.build(name), images[:2]), policies.load("w4a8"))
    quantize_graph(graph, images)
    with OneDevice(), torch.no_grad():
        logits = on_meta(graph.module)(torch.empty_like(images, device="meta"))
    assert logits.device.type == "meta"


def test_whitening_stays_on_the_device() -> None:
    network = on_meta(build("resnet8", CLASSES))
    with OneDevice():
        whiten_first_layer(network, torch.empty(COUNT, 3, 32, 32, device="meta"))
