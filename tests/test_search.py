from __future__ import annotations

import dataclasses
import itertools
import os
import random
from typing import Any

import pytest
from scipy.optimize import milp

from mpq.analyze import Search, build_policy, candidates, cost, locked_widths
from mpq.analyze.cost import Allocation
from mpq.analyze.sensitivity import Row, Sensitivity, by_name
from mpq.errors import InfeasibleError, PolicyError, UsageError
from mpq.latency import LatencyProfile, LayerLatency
from mpq.layers import LayerInfo, LiveSet, Widths
from mpq.policy import Constraints, DataInfo, LayerPolicy, ModelInfo, Policy
from mpq.spec import activation_spec, weight_spec
from mpq.targets import ONNXRUNTIME_CPU as TARGET
from mpq.targets import TARGETS


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
            rows += [Row(info.name, part, b, base * 4.0 ** (4 - b)) for b in (16, 8, 4)]
    held = [tuple((f"l{i}", rng.randint(50, 2000)) for i in (k, k + 1)) for k in range(count - 1)]
    live_sets = tuple(LiveSet(rng.randint(0, 4000), pair) for pair in held)
    return Sensitivity(
        tuple(rows), tuple(layers), groups, "fisher", 8, 0, "key", live_sets=live_sets
    )


def times(seed: int, count: int = 6) -> LatencyProfile:
    """Random times of a chain of layers."""
    rng = random.Random(seed)
    layers = {
        f"l{i}": LayerLatency(rng.uniform(0.1, 0.5), rng.uniform(0.4, 1.5)) for i in range(count)
    }
    edges = {(f"l{i}", f"l{i + 1}"): rng.uniform(0.01, 0.6) for i in range(count - 1)}
    return LatencyProfile("cpu", "runtime", 1, 1, layers, edges, 0.2)


def brute_force(
    sensitivity: Sensitivity, constraints: Constraints, pairs: list[Widths]
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


def meets(s: Sensitivity, widths: dict[str, Widths], c: Constraints) -> bool:
    latency = times(0).predict(TARGET.integers(s.layers, widths)) if c.max_latency_ms else 0.0
    spent = (
        (c.max_activation_mb, cost.activation_bytes(s.live_sets, widths) / 1e6),
        (c.max_latency_ms, latency),
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
    found = Search(s, widths=pairs).allocate(constraints)
    assert found.objective == pytest.approx(expected, rel=1e-9)
    assert meets(s, found.widths, constraints)
    assert found.objective == pytest.approx(s.predict(found.widths), rel=1e-12)
    assert (found.status, found.gap) == ("optimal", 0.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [(), (("l0", "l3"), ("l1", "l2"))])
def test_peaks_and_times_bind_as_brute_force_says(
    seed: int, groups: tuple[tuple[str, ...], ...]
) -> None:
    s, profile, pairs = problem(seed, groups=groups), times(0), candidates((16, 8, 4), (8, 4))
    low, high = Search(s, widths=pairs).range(Constraints(), "max_activation_mb")
    fast, slow = Search(s, widths=pairs, profile=profile).range(Constraints(), "max_latency_ms")
    constraints = Constraints(
        effective_bits=(7.0, None)[seed % 2],
        max_activation_mb=low + (0.2, 0.05, 0.4, 1.0)[seed] * (high - low),
        max_latency_ms=fast + (0.5, 0.3, 0.1, 0.6)[seed] * (slow - fast),
    )
    expected = brute_force(s, constraints, pairs)
    assert expected is not None
    found = Search(s, widths=pairs, profile=profile).allocate(constraints)
    assert meets(s, found.widths, constraints)
    assert found.objective == pytest.approx(expected, rel=1e-9)
    assert found.activation_bytes == cost.activation_bytes(s.live_sets, found.widths)
    assert found.latency_ms == profile.predict(TARGET.integers(s.layers, found.widths))


def test_ranges_are_what_brute_force_finds() -> None:
    s, profile, pairs = problem(1, 4), times(3, 4), candidates((16, 8), (8, 4))
    names = [info.name for info in s.layers]
    every = [dict(zip(names, choice, strict=True)) for choice in itertools.product(pairs, repeat=4)]
    peaks = [cost.activation_bytes(s.live_sets, w) / 1e6 for w in every]
    assert Search(s, widths=pairs).range(Constraints(), "max_activation_mb") == (
        min(peaks),
        max(peaks),
    )
    spent = [profile.predict(TARGET.integers(s.layers, w)) for w in every]
    found = Search(s, widths=pairs, profile=profile).range(Constraints(), "max_latency_ms")
    assert found == pytest.approx((min(spent), max(spent)), rel=1e-12)


@pytest.mark.parametrize(
    ("constraints", "told"),
    [
        (Constraints(max_bops=1e-6), r"max_bops must be in .*, got 1e-06"),
        (Constraints(max_activation_mb=1e-9), r"max_activation_mb must be in .*, got 1e-09"),
        (Constraints(max_latency_ms=0.01), r"max_latency_ms must be in .*, got 0\.01"),
        (Constraints(max_size_mb=1e-4), r"max_size_mb must be in .*, got 0\.0001"),
    ],
)
def test_every_kind_of_budget_tells_its_range(constraints: Constraints, told: str) -> None:
    with pytest.raises(InfeasibleError, match=told):
        Search(problem(0), profile=times(0)).allocate(constraints)


def test_a_budget_without_its_basis_says_what_is_missing() -> None:
    with pytest.raises(PolicyError, match="max_latency_ms needs measured times: `mpq profile"):
        Search(problem(0)).allocate(Constraints(max_latency_ms=1))
    old = dataclasses.replace(problem(0), live_sets=())
    with pytest.raises(PolicyError, match="max_activation_mb needs the activations"):
        Search(old).allocate(Constraints(max_activation_mb=1))
    with pytest.raises(UsageError, match="max_drop must be measured on images"):
        Search(problem(0)).allocate(Constraints(max_drop=0.5))
    with pytest.raises(UsageError, match=r"limit must be one of .*did you mean max_bops"):
        Search(problem(0)).range(Constraints(), "max_bop")


def test_a_large_search_is_exact() -> None:
    """Many layers: a core of the variables proves the optimum."""
    s, pairs = problem(9, 150), candidates((16, 8, 4), (8, 4))
    constraints = Constraints(effective_bits=5.0, max_bops=1.5)
    found = Search(s, widths=pairs).allocate(constraints)
    assert (found.status, found.gap) == ("optimal", 0.0)
    assert meets(s, found.widths, constraints)
    # No single step up is affordable and better, and no exchange of two layers is either.
    for name, pair in found.widths.items():
        for other in pairs:
            changed = {**found.widths, name: other}
            worse = s.predict(changed) >= found.objective - 1e-12
            assert pair == other or worse or not meets(s, changed, constraints)


def test_what_the_solver_leaves_on_stdout_is_not_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS prints some debugging to the C stdout; others may write there at the same time."""

    def leaky(*args: Any, **options: Any) -> Any:
        os.write(1, b"HighsMipSolverData::debris\nanother thread's line\n")
        return milp(*args, **options)

    monkeypatch.setattr("mpq.analyze.solver.milp", leaky)
    Search(problem(5)).allocate(Constraints(effective_bits=6.0))
    assert set(capfd.readouterr().out.splitlines()) == {"another thread's line"}


def test_the_least_cost_is_found_by_halves() -> None:
    s, pairs = problem(5), candidates((8, 4))
    measured = []

    def measure(allocation: Allocation) -> float:
        measured.append(allocation.effective_bits)
        return 8 - allocation.effective_bits  # a point for each bit

    search = Search(s, widths=pairs)
    found = search.least(Constraints(max_drop=2.0), measure)
    best = found[0]
    assert best.drop <= 2.0
    assert best.allocation.effective_bits == min(b for b in measured if b >= 6.0)
    assert len(measured) == len(set(measured)) == len(found)
    with pytest.raises(InfeasibleError, match="max_drop must be at least 3, which"):
        search.least(Constraints(max_drop=2.0), lambda allocation: 3.0)
    with pytest.raises(UsageError, match="least needs the max_drop"):
        search.least(Constraints(), measure)
    measured.clear()
    search.least(Constraints(max_drop=2.0, effective_bits=7.0), measure)
    assert max(measured) <= 7.0


@pytest.mark.parametrize("scale", [1e-14, 1e9])
def test_the_unit_of_the_scores_does_not_matter(scale: float) -> None:
    constraints = Constraints(effective_bits=5.5)
    small = Search(problem(3, scale=scale)).allocate(constraints)
    assert small.widths == Search(problem(3)).allocate(constraints).widths


def test_allocation_reports_what_its_widths_cost() -> None:
    s = problem(1)
    found = Search(s).allocate(Constraints(effective_bits=5.5))
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
    expected = TARGET.bytes_per_file + 8 + 12 + 2 * (4 * 8 + 1)
    expected += TARGET.bytes_per_layer[8] + TARGET.bytes_per_layer[4]
    expected += len("b")  # a layer of few bits has an entry in the policy that the file carries
    assert cost.predicted_bytes(layers, widths, TARGET) == expected
    assert (
        cost.effective_bits(layers, {"a": (None, None), "b": (16, 16)}) == (8 * 32 + 24 * 16) / 32
    )


def test_a_budget_at_the_very_edge_is_met() -> None:
    s = problem(0)
    found = Search(s).allocate(Constraints(effective_bits=4.0))
    assert {pair[0] for pair in found.widths.values()} == {4}


def test_a_budget_is_never_exceeded_by_the_tolerance_of_the_solver() -> None:
    s = problem(2)
    best = Search(s).allocate(Constraints(effective_bits=5.0))
    # Less than what the solver can tell apart, but less.
    budget = best.effective_bits * (1 - 1e-9)
    found = Search(s).allocate(Constraints(effective_bits=budget))
    assert found.effective_bits <= budget
    assert found.objective > best.objective


def test_no_budget_takes_the_widest() -> None:
    found = Search(problem(0)).allocate(Constraints())
    assert set(found.widths.values()) == {(16, 16)}


def test_an_infeasible_budget_names_the_achievable_range() -> None:
    pairs = candidates((8, 4))
    with pytest.raises(InfeasibleError, match=r"effective_bits must be in 4\.\.8, got 3\.5"):
        Search(problem(0), widths=pairs).allocate(Constraints(effective_bits=3.5))


def test_budgets_that_exclude_each_other_are_told_apart() -> None:
    s, pairs = problem(0), candidates((8, 4))
    constraints = Constraints(effective_bits=4.5, max_size_mb=1e-4)
    with pytest.raises(InfeasibleError, match=r"max_size_mb must be in .* \(with effective_bits"):
        Search(s, widths=pairs).allocate(constraints)


def test_locked_layers_keep_their_widths_and_count() -> None:
    s = problem(4)
    found = Search(
        s, widths=candidates((8, 4)), locked={"l2": (None, None), "l3": (2, 8)}
    ).allocate(Constraints(effective_bits=13))
    assert found.widths["l2"] == (None, None)
    assert found.widths["l3"] == (2, 8)
    assert found.effective_bits == cost.effective_bits(s.layers, found.widths) <= 13


def test_a_lock_on_an_unknown_layer_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"one of the network's\. Got 'l9'"):
        Search(problem(0), locked={"l9": (8, 8)}).allocate(Constraints())


def test_locks_that_contradict_a_group_are_refused() -> None:
    s = problem(0, groups=(("l0", "l1"),))
    locked = {"l0": (8, 8), "l1": (8, 4)}
    with pytest.raises(InfeasibleError, match="must agree on its activation width"):
        Search(s, locked=locked).allocate(Constraints())


def test_a_width_that_was_not_scored_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"scored at \[16, 8, 4\] only"):
        Search(problem(0), widths=[(6, 8)]).allocate(Constraints())


def test_sixteen_bits_come_as_a_pair() -> None:
    assert candidates((16, 8, 4), (8, 4)) == [(16, 16), (8, 8), (8, 4), (4, 8), (4, 4)]
    assert candidates((8, 4)) == [(8, 8), (4, 8)]


def test_pareto_front_rises_and_has_no_dominated_point() -> None:
    s, pairs = problem(5), candidates((8, 4))
    chosen = Search(s, widths=pairs).allocate(Constraints(effective_bits=4.8))
    front = Search(s, widths=pairs).front(Constraints(), also=[chosen])
    bits = [a.effective_bits for a in front]
    losses = [a.objective for a in front]
    assert bits == sorted(set(bits))
    assert losses == sorted(set(losses), reverse=True)
    assert (bits[0], bits[-1]) == (4.0, 8.0)
    assert chosen in front


def test_pareto_front_keeps_the_other_budgets() -> None:
    s, pairs = problem(5), candidates((8, 4))
    half = Constraints(max_size_mb=0.8 * front_bytes(s, pairs) / 1e6)
    front = Search(s, widths=pairs).front(half)
    assert front
    assert all(a.bytes <= half.max_size_mb * 1e6 for a in front)


def test_a_front_may_be_over_another_limit() -> None:
    s, pairs = problem(5), candidates((8, 4), (8, 4))
    front = Search(s, widths=pairs).front(Constraints(), sweep="max_bops")
    bops = [a.bitops for a in front]
    assert bops == sorted(bops)
    assert bops[0] == cost.bitops(s.layers, {info.name: (4, 4) for info in s.layers})


def front_bytes(s: Sensitivity, pairs: list[Widths]) -> int:
    return max(a.bytes for a in Search(s, widths=pairs).front(Constraints()))


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
    found = Search(s, widths=pairs).allocate(constraints)
    policy = policy_of(s, found, constraints)
    again = Policy.from_yaml(policy.to_yaml())
    assert again == policy
    choices = again.resolve(list(found.widths))
    assert {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()} == found.widths
    listed = {entry.name for entry in policy.layers}
    assert listed == {n for n, pair in found.widths.items() if pair != (8, 8)}
    assert policy.groups == (("l1", "l2"),)
    assert all(entry.reason for entry in policy.layers)
    assert set(policy.evidence) == set(found.widths)
    assert policy.evidence["l0"]["score"].keys() == {"16", "8", "4"}
    assert policy.result is not None
    assert policy.result.predicted_bytes == found.bytes


@pytest.mark.parametrize("cpu", TARGETS)
def test_locked_entries_of_a_base_policy_survive(cpu: str) -> None:
    s, constraints = problem(6), Constraints(effective_bits=5)
    base = Policy(
        target=cpu,
        layers=[
            LayerPolicy(name="l[01]", weight=weight_spec(8), locked=True, reason="by hand"),
            LayerPolicy(name="l1", activation=activation_spec(4)),
            LayerPolicy(name="l5", weight="float", activation="float", locked=True),
        ],
    )
    locked = locked_widths(base, by_name(s.layers))
    assert locked == {"l0": (8, 8), "l1": (8, 4), "l5": (None, None)}
    loose = constraints.replace(effective_bits=20)
    found = Search(s, widths=candidates((4,)), locked=locked).allocate(loose)
    policy = policy_of(s, found, loose, base)
    assert locked_widths(policy, by_name(s.layers)) == locked
    assert {entry.reason for entry in policy.layers if entry.name in ("l0", "l1")} == {"by hand"}
    choices = policy.resolve(list(found.widths))
    assert {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()} == found.widths


def test_reasons_tell_of_the_input_where_there_was_a_choice() -> None:
    s, pairs = problem(6), candidates((8,), (8, 4))
    names = [info.name for info in s.layers]
    limit = cost.bitops(s.layers, dict.fromkeys(names, (8, 4))) * 1.4 / 1e9
    found = Search(s, widths=pairs).allocate(Constraints(max_bops=limit))
    s = dataclasses.replace(s, rows=tuple(r for r in s.rows if r.bits != 16))
    evidence = policy_of(s, found, Constraints(max_bops=limit)).evidence
    for name, (_, act) in found.widths.items():
        assert f"; input {'kept at 8' if act == 8 else 'at 4'} bits: " in evidence[name]["reason"]
    assert {act for _, act in found.widths.values()} == {8, 4}


def test_reasons_name_the_layer_that_loses_most() -> None:
    s = problem(6)
    rows = [
        dataclasses.replace(r, score=50.0) if r.layer == "l3" and r.bits == 4 else r for r in s.rows
    ]
    s = dataclasses.replace(s, rows=tuple(rows))
    constraints = Constraints(effective_bits=9)
    found = Search(s, widths=candidates((8, 4))).allocate(constraints)
    policy = policy_of(s, found, constraints)
    assert policy.evidence["l3"]["reason"].startswith("most loss per byte saved")
