from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from mpq.analyze import allocate, build_policy, candidates, cost, locked_widths, pareto_front
from mpq.analyze.search import Allocation
from mpq.analyze.sensitivity import Row, Sensitivity, by_name
from mpq.errors import InfeasibleError, PolicyError
from mpq.layers import LayerInfo
from mpq.policy import Constraints, DataInfo, LayerPolicy, ModelInfo, Policy
from mpq.spec import activation_spec, weight_spec
from mpq.target import ONNXRUNTIME_CPU as TARGET


def layer(name: str, params: int, macs: int) -> LayerInfo:
    return LayerInfo(name, "linear", (4, params // 4), 4, True, macs, params // 4, 4)


def problem(
    seed: int, count: int = 6, *, groups: tuple[tuple[str, ...], ...] = (), scale: float = 1.0
) -> Sensitivity:
    """Random layers scored at 16, 8 and 4 bits, weights and activations."""
    rng = random.Random(seed)
    layers = [layer(f"l{i}", 4 * rng.randint(1, 400), rng.randint(10, 10**6)) for i in range(count)]
    rows = []
    for info in layers:
        for part in ("weight", "activation"):
            base = scale * 10 ** rng.uniform(-4, -1)
            for bits in (16, 8, 4):
                rows.append(Row(info.name, part, bits, base * 4.0 ** (4 - bits)))
    return Sensitivity(tuple(rows), tuple(layers), groups, "fisher", 8, 0, "key")


def brute_force(
    sensitivity: Sensitivity, constraints: Constraints, pairs: list[cost.Widths]
) -> float | None:
    """Least predicted loss over all configurations, None where none is allowed."""
    names = [info.name for info in sensitivity.layers]
    best = None
    for choice in itertools.product(pairs, repeat=len(names)):
        widths = dict(zip(names, choice, strict=True))
        if any(len({widths[n][1] for n in group}) > 1 for group in sensitivity.groups):
            continue
        if not meets(sensitivity, widths, constraints):
            continue
        value = sensitivity.predict(widths)
        best = value if best is None else min(best, value)
    return best


def meets(s: Sensitivity, widths: dict[str, cost.Widths], c: Constraints) -> bool:
    spent = (
        (c.effective_bits, cost.effective_bits(s.layers, widths)),
        (c.max_size_mb, cost.predicted_bytes(s.layers, widths, TARGET) / 1e6),
        (c.max_bops, cost.bitops(s.layers, widths) / 1e9),
    )
    return all(limit is None or value <= limit * (1 + 1e-12) for limit, value in spent)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("groups", [(), (("l0", "l3"), ("l1", "l2", "l4"))])
def test_allocate_finds_what_brute_force_finds(
    seed: int, groups: tuple[tuple[str, ...], ...]
) -> None:
    s = problem(seed, groups=groups)
    pairs = candidates((16, 8, 4), (8, 4))
    uniform = {info.name: (8, 8) for info in s.layers}
    size = cost.predicted_bytes(s.layers, uniform, TARGET) / 1e6
    constraints = Constraints(
        effective_bits=(None, 5.1, 7.0)[seed % 3],
        max_size_mb=(size, None, size * 0.97)[seed % 3],
        max_bops=(None, cost.bitops(s.layers, uniform) / 1.5e9)[seed % 2],
    )
    expected = brute_force(s, constraints, pairs)
    found = allocate(s, constraints, target=TARGET, pairs=pairs)
    assert found.objective == pytest.approx(expected, rel=1e-9)
    assert meets(s, found.widths, constraints)
    assert found.objective == pytest.approx(s.predict(found.widths), rel=1e-12)
    assert (found.status, found.gap) == ("optimal", 0.0)


@pytest.mark.parametrize("scale", [1e-14, 1e9])
def test_the_unit_of_the_scores_does_not_matter(scale: float) -> None:
    constraints = Constraints(effective_bits=5.5)
    small = allocate(problem(3, scale=scale), constraints, target=TARGET)
    assert small.widths == allocate(problem(3), constraints, target=TARGET).widths


def test_allocation_reports_what_its_widths_cost() -> None:
    s = problem(1)
    found = allocate(s, Constraints(effective_bits=5.5), target=TARGET)
    assert found.effective_bits == cost.effective_bits(s.layers, found.widths)
    assert found.bytes == cost.predicted_bytes(s.layers, found.widths, TARGET)
    assert found.weight_bytes == cost.weight_bytes(s.layers, found.widths)
    assert found.bitops == cost.bitops(s.layers, found.widths)


def test_costs_of_a_hand_made_pair() -> None:
    layers = (layer("a", 8, 100), layer("b", 24, 10))
    widths = {"a": (8, 8), "b": (4, 8)}
    assert cost.effective_bits(layers, widths) == (8 * 8 + 24 * 4) / 32
    assert cost.weight_bytes(layers, widths) == 8 + 12
    assert cost.bitops(layers, widths) == 100 * 64 + 10 * 32
    # Four channels each: a scale and a bias of four bytes.
    expected = 8 + 12 + 2 * (4 * 8 + TARGET.bytes_per_layer)
    assert cost.predicted_bytes(layers, widths, TARGET) == expected
    assert (
        cost.effective_bits(layers, {"a": (None, None), "b": (16, 16)}) == (8 * 32 + 24 * 16) / 32
    )


def test_a_budget_at_the_very_edge_is_met() -> None:
    s = problem(0)
    found = allocate(s, Constraints(effective_bits=4.0), target=TARGET)
    assert {pair[0] for pair in found.widths.values()} == {4}


def test_a_budget_is_never_exceeded_by_the_tolerance_of_the_solver() -> None:
    s = problem(2)
    best = allocate(s, Constraints(effective_bits=5.0), target=TARGET)
    # Less than what the solver can tell apart, but less.
    budget = best.effective_bits * (1 - 1e-9)
    found = allocate(s, Constraints(effective_bits=budget), target=TARGET)
    assert found.effective_bits <= budget
    assert found.objective > best.objective


def test_no_budget_takes_the_widest() -> None:
    found = allocate(problem(0), Constraints(), target=TARGET)
    assert set(found.widths.values()) == {(16, 16)}


def test_an_infeasible_budget_names_the_achievable_range() -> None:
    pairs = candidates((8, 4))
    with pytest.raises(InfeasibleError, match=r"effective_bits must be in 4\.\.8, got 3\.5"):
        allocate(problem(0), Constraints(effective_bits=3.5), target=TARGET, pairs=pairs)


def test_budgets_that_exclude_each_other_are_told_apart() -> None:
    s, pairs = problem(0), candidates((8, 4))
    constraints = Constraints(effective_bits=4.5, max_size_mb=1e-4)
    with pytest.raises(InfeasibleError, match=r"max_size_mb must be in .* \(with effective_bits"):
        allocate(s, constraints, target=TARGET, pairs=pairs)


def test_locked_layers_keep_their_widths_and_count() -> None:
    s = problem(4)
    found = allocate(
        s,
        Constraints(effective_bits=13),
        target=TARGET,
        pairs=candidates((8, 4)),
        locked={"l2": (None, None), "l3": (2, 8)},
    )
    assert found.widths["l2"] == (None, None)
    assert found.widths["l3"] == (2, 8)
    assert found.effective_bits == cost.effective_bits(s.layers, found.widths) <= 13


def test_a_lock_on_an_unknown_layer_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"one of the network's\. Got 'l9'"):
        allocate(problem(0), Constraints(), target=TARGET, locked={"l9": (8, 8)})


def test_locks_that_contradict_a_group_are_refused() -> None:
    s = problem(0, groups=(("l0", "l1"),))
    locked = {"l0": (8, 8), "l1": (8, 4)}
    with pytest.raises(InfeasibleError, match="must agree on its activation width"):
        allocate(s, Constraints(), target=TARGET, locked=locked)


def test_a_width_that_was_not_scored_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"scored at \[16, 8, 4\] only"):
        allocate(problem(0), Constraints(), target=TARGET, pairs=[(6, 8)])


def test_sixteen_bits_come_as_a_pair() -> None:
    assert candidates((16, 8, 4), (8, 4)) == [(16, 16), (8, 8), (8, 4), (4, 8), (4, 4)]
    assert candidates((8, 4)) == [(8, 8), (4, 8)]


def test_pareto_front_rises_and_has_no_dominated_point() -> None:
    s, pairs = problem(5), candidates((8, 4))
    chosen = allocate(s, Constraints(effective_bits=4.8), target=TARGET, pairs=pairs)
    front = pareto_front(s, Constraints(), target=TARGET, pairs=pairs, also=[chosen])
    bits = [a.effective_bits for a in front]
    losses = [a.objective for a in front]
    assert bits == sorted(set(bits))
    assert losses == sorted(set(losses), reverse=True)
    assert (bits[0], bits[-1]) == (4.0, 8.0)
    assert chosen in front


def test_pareto_front_keeps_the_other_budgets() -> None:
    s, pairs = problem(5), candidates((8, 4))
    half = Constraints(max_size_mb=0.8 * front_bytes(s, pairs) / 1e6)
    front = pareto_front(s, half, target=TARGET, pairs=pairs)
    assert front
    assert all(a.bytes <= half.max_size_mb * 1e6 for a in front)


def front_bytes(s: Sensitivity, pairs: list[cost.Widths]) -> int:
    return max(a.bytes for a in pareto_front(s, Constraints(), target=TARGET, pairs=pairs))


def policy_of(
    s: Sensitivity, found: Allocation, constraints: Constraints, base: Policy | None = None
) -> Policy:
    return build_policy(
        found,
        s,
        model=ModelInfo(arch="net", classes=4),
        data=DataInfo(name="digits"),
        constraints=constraints,
        target=TARGET.name,
        base=base,
    )


def test_the_policy_resolves_to_the_allocation() -> None:
    s, constraints = problem(6, groups=(("l1", "l2"),)), Constraints(effective_bits=6)
    pairs = candidates((16, 8, 4), (8, 4))
    found = allocate(s, constraints, target=TARGET, pairs=pairs)
    policy = policy_of(s, found, constraints)
    again = Policy.from_yaml(policy.to_yaml())
    assert again == policy
    choices = again.resolve(list(found.widths))
    assert {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()} == found.widths
    listed = {entry.name for entry in policy.layers}
    assert listed == {n for n, pair in found.widths.items() if pair != (8, 8)}
    assert policy.groups == [["l1", "l2"]]
    assert all(entry.reason for entry in policy.layers)
    assert set(policy.evidence) == set(found.widths)
    assert policy.evidence["l0"]["score"].keys() == {"16", "8", "4"}
    assert policy.result is not None
    assert policy.result.predicted_bytes == found.bytes


def test_locked_entries_of_a_base_policy_survive() -> None:
    s, constraints = problem(6), Constraints(effective_bits=5)
    base = Policy(
        layers=[
            LayerPolicy(name="l[01]", weight=weight_spec(8), locked=True, reason="by hand"),
            LayerPolicy(name="l1", activation=activation_spec(4)),
            LayerPolicy(name="l5", weight="float", activation="float", locked=True),
        ]
    )
    locked = locked_widths(base, by_name(s.layers))
    assert locked == {"l0": (8, 8), "l1": (8, 4), "l5": (None, None)}
    loose = constraints.model_copy(update={"effective_bits": 20})
    found = allocate(s, loose, target=TARGET, pairs=candidates((4,)), locked=locked)
    policy = policy_of(s, found, loose, base)
    assert locked_widths(policy, by_name(s.layers)) == locked
    assert {entry.reason for entry in policy.layers if entry.name in ("l0", "l1")} == {"by hand"}
    choices = policy.resolve(list(found.widths))
    assert {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()} == found.widths


def test_reasons_name_the_layer_that_loses_most() -> None:
    s = problem(6)
    rows = [
        dataclasses.replace(r, score=50.0) if r.layer == "l3" and r.bits == 4 else r for r in s.rows
    ]
    s = dataclasses.replace(s, rows=tuple(rows))
    constraints = Constraints(effective_bits=9)
    found = allocate(s, constraints, target=TARGET, pairs=candidates((8, 4)))
    policy = policy_of(s, found, constraints)
    assert policy.evidence["l3"]["reason"].startswith("most loss per byte saved")
