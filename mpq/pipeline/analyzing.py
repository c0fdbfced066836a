"""`analyze`: score a network once, then search a policy for each budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mpq.analyze.drop import Measured, least_cost
from mpq.analyze.explain import build_policy, locked_widths
from mpq.analyze.perturb import Rounding
from mpq.analyze.score import LABELLED, Metric, Scoring
from mpq.analyze.search import Allocation, allocate, candidates, limit_range, pareto_front
from mpq.analyze.sensitivity import Sensitivity
from mpq.analyze.validate import Validation
from mpq.analyze.validate import validate as measure_scores
from mpq.errors import PolicyError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.latency import LatencyProfile
from mpq.layers import LayerChoice, Widths
from mpq.pipeline.analysis import Analysis, Choice
from mpq.pipeline.dropping import DropMeter
from mpq.pipeline.scoring import scores_of
from mpq.pipeline.subject import Subject
from mpq.policy import Constraints, DataInfo, Policy
from mpq.target import Target, get_target

logger = logging.getLogger(__name__)
DEFAULT_EFFECTIVE_BITS = 4.8
VALIDATION_IMAGES = 500
Progress = Callable[[str, int, int], None]


def find_policy(
    subject: Subject,
    constraints: Constraints | Sequence[Constraints],
    *,
    bits: Sequence[int] = (8, 4),
    act_bits: Sequence[int] = (8,),
    metric: Metric = "fisher",
    rounding: Rounding = "nearest",
    samples: int = 512,
    seed: int = 0,
    target: str | None = None,
    locked: Policy | None = None,
    profile: LatencyProfile | None = None,
    minimize: str = "effective_bits",
    known: Sequence[Path] = (),
    rescore: bool = False,
    validate: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Analysis:
    """Score a network's layers once and choose their widths for each budget.

    Args:
        subject: the network and its data; without data the metric becomes `sqnr`.
        constraints: budgets; none at all means 4.8 effective bits. Of several, each gets a policy.
        bits: weight widths to choose from; 16 brings 16-bit activations with it.
        act_bits: activation widths to choose from.
        metric: sensitivity metric.
        rounding: how the weights that are scored are rounded.
        samples: training images to score on.
        seed: of the sample and of the scoring.
        target: runtime to plan for; None: that of this computer.
        locked: a policy whose locked entries are kept.
        profile: measured times, for `max_latency_ms`.
        minimize: the limit that `max_drop` makes as small as it can, and that the front is over.
        known: sensitivity files to take the scores from where they fit, before the cache.
        rescore: score anew whatever there is.
        validate: random configurations to measure the scores against, on validation images.
        device: where layers are scored and scores validated; `ptq` runs on the CPU.
        progress: told (phase, done, all).

    Raises:
        InfeasibleError: no widths meet the budgets.
        PolicyError: widths that the target does not have, locks that do not fit the network.
        DataError: `max_drop` without data.
    """
    budgets = [constraints] if isinstance(constraints, Constraints) else list(constraints)
    work = _Work(
        subject,
        Scoring(tuple(bits), tuple(act_bits), metric, seed, rounding=rounding),
        get_target(target),
        locked,
        profile,
        minimize,
        rescore,
        device,
        progress or (lambda phase, done, total: None),
    )
    return work.run([_default(c) for c in budgets], samples, known, validate)


def _default(constraints: Constraints) -> Constraints:
    if constraints.budgets() or constraints.max_drop is not None:
        return constraints
    return Constraints(effective_bits=DEFAULT_EFFECTIVE_BITS)


@dataclass(frozen=True)
class _Work:
    """The settings of one analysis."""

    subject: Subject
    how: Scoring
    target: Target
    locked: Policy | None
    profile: LatencyProfile | None
    minimize: str
    rescore: bool
    device: str
    progress: Progress

    def run(
        self,
        budgets: Sequence[Constraints],
        samples: int,
        known: Sequence[Path],
        validate: int,
    ) -> Analysis:
        """Score, search each budget, and the front."""
        names = _names(budgets)
        pairs = _pairs(self.how.bits, self.how.act_bits, self.target)
        graph = self.subject.graph()
        kept = locked_widths(self.locked, graph.layers) if self.locked else {}
        how, images, labels = self._images(samples)
        scores, place = scores_of(
            graph,
            images,
            labels,
            how,
            places=known,
            rescore=self.rescore,
            progress=lambda done, total: self.progress("scoring", done, total),
        )
        search = _Search(scores, self.target, pairs, kept, self.profile, self.minimize)
        measured: list[Measured] = []
        found = [self._solve(search, c, graph, measured) for c in budgets]
        data = DataInfo(name=self.subject.data_name, samples=scores.samples, seed=how.seed)
        drops = {id(m.allocation): m.drop for m in measured}
        choices = [
            Choice(name, self._policy(c, a, scores, data, drops.get(id(a))), a)
            for name, c, a in zip(names, budgets, found, strict=True)
        ]
        front = search.front(budgets[0], found)
        truth = self._validate(graph, scores, pairs, images, validate) if validate else None
        return Analysis(
            choices=tuple(choices),
            sensitivity=scores,
            front=front,
            sweep=self.minimize,
            scores_from=place,
            measured=tuple(measured),
            validation=truth,
        )

    def _validate(
        self,
        graph: QuantGraph,
        scores: Sensitivity,
        pairs: Sequence[Widths],
        images: Tensor | None,
        count: int,
    ) -> Validation:
        """Measure random configurations on images that were not scored."""
        data = self.subject.require_data("--validate")
        assert images is not None
        source = data.validation if len(data.validation) else data.compared
        held, labels = self.subject.labelled(source, VALIDATION_IMAGES, self.how.seed)
        return measure_scores(
            graph,
            scores,
            pairs,
            scored=images,
            images=held.to(self.device),
            labels=labels.to(self.device),
            count=count,
            seed=self.how.seed,
            rounding=self.how.rounding,
            progress=lambda done, total: self.progress("validating", done, total),
        )

    def _images(self, samples: int) -> tuple[Scoring, Tensor | None, Tensor | None]:
        """The images to score on; without any, the metric is the one that needs none."""
        if self.subject.data is None:
            if self.how.metric != "sqnr":
                logger.warning("without data, layers are scored by the SQNR of their weights")
            return replace(self.how, metric="sqnr"), None, None
        if self.how.metric not in LABELLED:
            images = self.subject.sample(samples, self.how.seed, "scoring")
            return self.how, images.to(self.device), None
        images, labels = self.subject.labelled(self.subject.data.train, samples, self.how.seed)
        return self.how, images.to(self.device), labels

    def _solve(
        self, search: _Search, budget: Constraints, graph: QuantGraph, measured: list[Measured]
    ) -> Allocation:
        if budget.max_drop is None:
            return search.allocate(budget)
        meter = DropMeter(self.subject, graph, relative=budget.drop_type == "relative")
        found = search.least(
            budget, meter.drop, lambda done, total: self.progress("measuring", done, total)
        )
        measured += found
        return found[0].allocation

    def _policy(
        self,
        constraints: Constraints,
        allocation: Allocation,
        scores: Sensitivity,
        data: DataInfo,
        drop: float | None,
    ) -> Policy:
        return build_policy(
            allocation,
            scores,
            model=self.subject.info,
            data=data,
            constraints=constraints,
            target=self.target.name,
            base=self.locked,
            measured_drop=drop,
        )


@dataclass(frozen=True)
class _Search:
    """The search over one network's scores."""

    scores: Sensitivity
    target: Target
    pairs: Sequence[Widths]
    kept: dict[str, Widths]
    profile: LatencyProfile | None
    minimize: str

    def allocate(self, budget: Constraints) -> Allocation:
        """The best configuration within a budget."""
        return allocate(
            self.scores,
            budget,
            target=self.target,
            pairs=self.pairs,
            locked=self.kept,
            profile=self.profile,
        )

    def least(
        self,
        budget: Constraints,
        measure: Callable[[Allocation], float],
        told: Callable[[int, int], None],
    ) -> list[Measured]:
        """The cheapest configuration that holds an accuracy, and all that was measured for it."""
        assert budget.max_drop is not None
        rest = budget.without()
        span = limit_range(
            self.scores,
            rest,
            self.minimize,
            target=self.target,
            pairs=self.pairs,
            locked=self.kept,
            profile=self.profile,
        )
        cap = budget.budgets().get(self.minimize)
        return least_cost(
            lambda value: self.allocate(rest.with_limit(self.minimize, value)),
            span if cap is None else (min(span[0], cap), min(span[1], cap)),
            measure,
            max_drop=budget.max_drop,
            told=told,
        )

    def front(self, budget: Constraints, also: Sequence[Allocation]) -> list[Allocation]:
        """The Pareto front through the configurations that were chosen."""
        return pareto_front(
            self.scores,
            budget,
            target=self.target,
            pairs=self.pairs,
            locked=self.kept,
            profile=self.profile,
            sweep=self.minimize,
            also=also,
        )


def _names(budgets: Sequence[Constraints]) -> list[str]:
    """File names of the policies: the first is `policy.yaml`, the others say their budget."""
    named = [f"policy-{c.effective_bits:g}.yaml" for c in budgets[1:]]
    if len(set(named)) < len(named):
        raise UsageError(f"budgets must differ from each other. Got {', '.join(named)} twice.")
    return ["policy.yaml", *named]


def _pairs(bits: Sequence[int], act_bits: Sequence[int], target: Target) -> list[Widths]:
    """The candidates, known to the target before any work is done for them."""
    pairs = candidates(bits, act_bits)
    if not pairs:
        raise PolicyError(
            f"--bits and --act-bits must give a pair of widths, and 16-bit weights go with 16-bit "
            f"activations only. Got {list(bits)} and {list(act_bits)}. Try --bits 8,4 --act-bits 8."
        )
    for pair in pairs:
        target.support(LayerChoice.at("any", *pair))
    return pairs
