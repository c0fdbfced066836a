"""Histograms of weights and inputs, and the ranges that their integers cover."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from nets import build, calibrate, images

from mpq.graph.passes import prepare
from mpq.pipeline.ranges import ranges
from mpq.policy import Policy


def quantized(bits=4):
    graph = calibrate(prepare(build("plain"), Policy.uniform(bits, 8), images()), images())
    # Of a quantized network no more is asked than its graph and the name of its data.
    return SimpleNamespace(module=graph.module, policy=graph.policy, layers=list(graph.layers))


def test_every_value_is_counted_and_what_lies_outside_is_said():
    found = quantized()
    name = found.layers[1]
    layer = found.module.get_submodule(name)
    layer.set_scale(layer.scale.detach() / 2)
    told = ranges(found, [name], images() * 3, {})
    (row,) = told["layers"]
    assert (row["layer"], told["images"]) == (name, 2)
    weight, steps = row["weight"], layer.weight.detach().flatten(1) / layer.step()[:, None]
    assert sum(weight["counts"]) == layer.weight.numel()
    assert (weight["from"], weight["to"], weight["bits"]) == (-8, 7, 4)
    outside = ((steps < -8.5) | (steps > 7.5)).double().mean()
    assert 0 < weight["clipped"] == float(outside)
    assert row["activation"]["bits"] == 8
    assert row["activation"]["clipped"] > 0  # images three times those of the calibration
    json.dumps(told)


def test_weights_are_those_before_rounding_unless_they_were_changed():
    found = quantized()
    name = found.layers[1]
    layer = found.module.get_submodule(name)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        steps = layer.step().reshape(-1, *[1] * (before.ndim - 1))
        layer.weight.copy_((before / steps).round().clamp(-8, 7) * steps)
    rounded, known = (ranges(found, [name], None, o)["layers"][0] for o in ({}, {name: before}))
    assert rounded["weight"]["sqnr"] is None or rounded["weight"]["sqnr"] > 80
    assert 10 < known["weight"]["sqnr"] < 40
    assert known["activation"] is None
    other = ranges(found, [name], None, {name: before.flip(0)})["layers"][0]
    assert other["weight"] == rounded["weight"]
