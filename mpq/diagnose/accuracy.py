"""Which layers cost the accuracy, and why: outliers, dead channels, ranges, depthwise layers.

A cause is named where two things come together: the scores say that the layer costs much, and its
tensors (`mpq.diagnose.tensors`) say that a few values cause most of its rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mpq.diagnose.facts import Facts, Json
from mpq.diagnose.finding import Finding, listed
from mpq.layers import weight_bytes
from mpq.noise import margin

FLOOR = 0.01
"""Nats: what costs less changes no answer that anybody would notice."""
LARGE = 0.1
"""Part of the whole cost from which on a layer is worth a word."""
CAUSED = 0.9
"""Part of the rounding error of all others that a few cause, to be the cause: they make the step
3.2 times what it would be. 0.7 at most was seen in networks without any."""
SURE = 1.0
"""Points: a measurement that chance blurs less shows that nothing is lost, whatever was predicted.
"""
DEAD = 1 / 3
"""Part of a layer's channels that do nothing; a quarter is common after training with ReLU."""
WORTH = 2.0
"""Times less rounding noise, from which on `mpq ptq` rescales by itself."""
WORDS = 2
"""Layers that evidence speaks of one by one."""
SPREAD = 30.0
"""Times by which the ranges of a depthwise layer's channels differ."""


def find(facts: Facts) -> Iterator[Finding]:
    """The findings, layer after layer, the costliest first."""
    tensors = {} if facts.tensors is None else facts.tensors["layers"]
    order = sorted(facts.layers, key=facts.cost, reverse=True)
    lost, by_training = lost_points(facts), _lost_by_training(facts)
    if by_training:
        yield _training(facts, by_training)
        lost = lost and (lost[0] - by_training, lost[1])  # which no budget wins back
    if lost is not None and lost[0] > lost[1]:
        yield _measured(facts, order, *lost)
    for name in order if lost is None or lost[0] > lost[1] or lost[1] > SURE else ():
        if name in tensors:
            yield from _weights(facts, name, tensors[name]["weight"])
            yield from _input(facts, name, tensors[name])
            yield from _depthwise(facts, name, tensors)
    yield from _dead(facts, tensors)


def matters(facts: Facts, cost: float) -> bool:
    """Whether a cost is a large part of the whole, and noticeable where that can be judged."""
    return cost >= LARGE * facts.total > 0 and (cost >= FLOOR or not facts.in_nats)


def lost_points(facts: Facts) -> tuple[float, float] | None:
    """Points of top-1 that the file has less than float, and how many chance explains."""
    model, plain = facts.row("model.onnx"), facts.row("float.onnx")
    if model is None or plain is None or model["top1"] is None or plain["top1"] is None:
        return None
    noise = margin(plain["top1"], model["top1"], model["n"])
    return plain["top1"] - model["top1"], noise


def _lost_by_training(facts: Facts) -> float:
    """Points of top-1 that the network had before it was trained and has no more; 0 within noise.

    Both are measured on the same held-out images, so noise is what chance explains of them.
    """
    found = facts.trained or {}
    before, after = found.get("calibrated_top1"), found.get("validation_top1")
    count = found.get("validation_images")
    if before is None or after is None or not count:
        return 0.0
    return before - after if before - after > margin(before, after, count) else 0.0


def _training(facts: Facts, lost: float) -> Finding:
    """A training that ended below where it began: too few epochs to settle, or too large a step."""
    assert facts.trained is not None
    found, epochs = facts.trained, facts.trained["epochs"]
    evidence = (
        f"top-1 {found['calibrated_top1']:.2f} % before the training and "
        f"{found['validation_top1']:.2f} % after {epochs} epoch{'s' * (epochs != 1)}, on the same "
        f"{found['validation_images']:,} held-out images"
    )
    remedy = (
        f"mpq qat --epochs {max(10, 5 * epochs)} --force, --set lr=LOWER with it, or without "
        "training: mpq ptq, and mpq export --from ptq --force"
    )
    cause = "the training made it worse: it was too short, or its learning rate too high"
    return Finding("accuracy", (), cause, evidence, remedy, f"{lost:.2f} points without training")


def _measured(facts: Facts, order: list[str], lost: float, noise: float) -> Finding:
    """A loss of accuracy that chance does not explain: where it is, and the next larger budget."""
    where: list[str] = []
    for name in order:
        if sum(map(facts.cost, where)) >= facts.total / 2:
            break
        where.append(name)
    model, plain = facts.row("model.onnx"), facts.row("float.onnx")
    assert model is not None
    assert plain is not None
    evidence = (
        f"top-1 {model['top1']:.2f} %, float {plain['top1']:.2f} % on the same {model['n']:,} "
        f"images: {lost:.2f} points lost, of which chance explains {noise:.2f}"
    )
    if where:
        evidence += "; half of the predicted cost lies in what is named here"
    return Finding("accuracy", tuple(where), "accuracy is lost", evidence, *_next_budget(facts))


def _next_budget(facts: Facts) -> tuple[str, str]:
    """The cheapest configuration of the front that is to cost half as much."""
    front = (facts.sensitivity or {}).get("front") or []
    now = facts.total
    better = [c for c in front if c["predicted_drop"] <= now / 2]
    if not better:
        return "mpq ptq --effort best, or mpq qat with a teacher", ""
    chosen = min(better, key=lambda c: c["effective_bits"])
    before = facts.policy.result if facts.policy is not None else None
    bytes_more = "" if before is None else f", {chosen['bytes'] - before.predicted_bytes:+,} bytes"
    return (
        f"mpq analyze --effective-bits {chosen['effective_bits']:.2f}, mpq ptq --effort best, or "
        "mpq qat with a teacher",
        f"the budget: predicted {now:.3g} to {chosen['predicted_drop']:.3g} {facts.unit}"
        f"{bytes_more}",
    )


def _weights(facts: Facts, name: str, weight: Json) -> Iterator[Finding]:
    """Input channels, or single weights, that set the scale of all others in their rows."""
    bits = facts.widths.get(name, (None, None))[0]
    cost = facts.score(name, "weight", bits)
    if bits is None or not matters(facts, cost):
        return
    of_channels = weight.get("channel", {}).get(str(bits))
    single = weight.get("single", {}).get(str(bits))
    if of_channels and of_channels["share"] >= CAUSED:
        caused, cause = (
            of_channels,
            f"outliers in the weights of input {_channels(weight['apart'])}",
        )
        evidence = f"they are {weight['ratio']:.3g} times as large as those of any other"
    elif single and single["share"] >= CAUSED:
        caused, cause = single, "outliers among its weights"
        evidence = f"single weights, the worst in output channel {single['row']},"
    else:
        return
    evidence += (
        f" and cause {caused['share']:.0%} of the rounding error of the rest at {bits} bits; "
        f"{_part(facts, cost)}"
    )
    remedy = _rescaled(facts, name) or _widened(facts, name, bits, cost, caused["part"])
    yield Finding("accuracy", (name,), cause, evidence, *remedy)


def _input(facts: Facts, name: str, found: Json) -> Iterator[Finding]:
    """Channels that stretch the range of what a layer reads, and leave few steps to the others."""
    bits = facts.widths.get(name, (None, None))[1]
    cost, seen = facts.score(name, "activation", bits), found.get("input")
    if bits is None or seen is None or not matters(facts, cost) or seen["share"] < CAUSED:
        return
    whole = max(seen["high"], 0.0) - min(seen["low"], 0.0)
    steps = max(1, round((2**bits - 1) * seen["without"] / whole))
    writers = found["writers"]
    source = f"what {writers[0]} writes" if len(writers) == 1 else "its input"
    evidence = (
        f"{source} spans {seen['low']:.3g} to {seen['high']:.3g}, all other channels "
        f"{seen['without']:.3g}, which leaves them {steps} of {2**bits - 1} steps; "
        f"{_part(facts, cost)}"
    )
    in_float = (
        f"{{name: {name}, weight: int16/channel, activation: int16/tensor}} in policy.yaml, which "
        "runs in float, then mpq ptq --force",
        _predicted(facts, cost),
    )
    yield Finding(
        "accuracy",
        (name,),
        f"{_channels(seen['apart'])} of its input is an outlier and stretches the range",
        evidence,
        *(_rescaled(facts, name) or in_float),
    )


def _depthwise(facts: Facts, name: str, tensors: Json) -> Iterator[Finding]:
    """Channels of a depthwise layer whose ranges differ, which whoever reads them has to undo."""
    weight, bits = tensors[name]["weight"], facts.widths.get(name, (None, None))[0]
    if facts.layers[name]["kind"] != "depthwise" or weight.get("spread", 1.0) < SPREAD:
        return
    readers = [n for n, one in tensors.items() if name in one["writers"]]
    cost = facts.score(name, "weight", bits) + sum(map(facts.cost, readers))
    if bits is None or not matters(facts, cost):
        return
    evidence = (
        f"{weight['values']} weights per channel, whose ranges differ {weight['spread']:.0f} times "
        f"between channels; one range for what it writes leaves the small ones few steps, and the "
        f"weights of {listed(readers)} must make up for it; with these {_part(facts, cost)}"
    )
    cause = "depthwise, with channels of very different ranges"
    remedy = next((r for r in (_rescaled(facts, one) for one in readers) if r), None)
    own = facts.score(name, "weight", bits)
    yield Finding(
        "accuracy", (name,), cause, evidence, *(remedy or _widened(facts, name, bits, own, 0.0))
    )


def _dead(facts: Facts, tensors: Json) -> Iterator[Finding]:
    """Channels that are zero for every image, or whose weights are: bytes and time for nothing."""
    found: dict[str, tuple[float, str]] = {}
    for name, one in tensors.items():
        weight, seen, writers = one["weight"], one.get("input"), one["writers"]
        if weight["dead"] >= DEAD * weight["rows"]:
            told = f"the weights of {weight['dead']} of its {weight['rows']} output channels are 0"
            found[name] = (weight["dead"] / weight["rows"], told)
        if seen is None or len(writers) != 1 or seen["dead"] < DEAD * seen["channels"]:
            continue
        if writers[0] not in found:
            images = facts.tensors["images"] if facts.tensors else 0
            told = f"{seen['dead']} of its {seen['channels']} outputs are 0 for all {images} images"
            found[writers[0]] = (seen["dead"] / seen["channels"], told)
    if not found:
        return
    order = sorted(found, key=lambda name: -found[name][0])
    readers = {n: [r for r, one in tensors.items() if one["writers"] == [n]] for n in order}
    evidence = "; ".join(f"{name}: {found[name][1]}" for name in order[:WORDS])
    more = f"; and {len(order) - WORDS} more" if len(order) > WORDS else ""
    yield Finding(
        "accuracy",
        tuple(order),
        "dead channels",
        f"{evidence}{more}; less of the network works than it has",
        "remove them from the network: its answers stay the same",
        _wasted(facts, [([name, *readers[name]], found[name][0]) for name in order]),
    )


def _wasted(facts: Facts, dead: list[tuple[list[str], float]]) -> str:
    """What dead channels take: rows of the layers that write them, columns of those that read."""
    size = macs = 0.0
    for names, share in dead:
        for layer in (facts.layers[name] for name in names if name in facts.layers):
            bits = facts.widths.get(layer["name"], (8, 8))[0]
            size += share * weight_bytes(layer["params"], bits)
            macs += share * layer["macs"]
    return f"{round(size):,} bytes and {round(macs):,} MACs less" if size else ""


def _rescaled(facts: Facts, second: str) -> tuple[str, str] | None:
    """What rescaling the channels between a layer and the one before it is expected to bring."""
    pairs = (facts.tensors or {}).get("pairs") or []
    pair = next((p for p in pairs if p["second"] == second and p["gain"] >= WORTH), None)
    if pair is None:
        return None
    return (
        f"mpq ptq, which by itself rescales the channels between {pair['first']} and {second} "
        "(--equalize auto); the scores, made before, do not know of it",
        f"expected rounding noise of {pair['first']} and {second} together {pair['gain']:,.1f} "
        "times smaller",
    )


def _widened(facts: Facts, name: str, bits: int, cost: float, part: float) -> tuple[str, str]:
    """The next width that was scored for a layer's weights, and what the scores say of it."""
    scored = {b for n, kind, b in facts.scores if (n, kind) == (name, "weight")}
    wider = sorted(b for b in scored if bits < b <= 8)
    if not wider:
        return "mpq qat with a teacher", f"{_predicted(facts, cost * part)}, if all is won back"
    params, saved = facts.layers[name]["params"], cost - facts.score(name, "weight", wider[0])
    more = weight_bytes(params, wider[0]) - weight_bytes(params, bits)
    return (
        f"{{name: {name}, weight: int{wider[0]}/channel, locked: true}} in policy.yaml, then "
        "mpq ptq --force",
        f"{_predicted(facts, saved)}, {more:+,} bytes",
    )


def _predicted(facts: Facts, saved: float) -> str:
    """What is left of the predicted cost of the whole network."""
    left = max(facts.total - saved, 0.0)
    return f"predicted cost of the whole policy from {facts.total:.3g} to {left:.3g} {facts.unit}"


def _part(facts: Facts, cost: float) -> str:
    return f"it is {cost / facts.total:.0%} of the predicted {facts.total:.3g} {facts.unit}"


def _channels(apart: Any) -> str:
    names = [str(index) for index in apart]
    return f"channel {names[0]}" if len(names) == 1 else f"channels {listed(names)}"
