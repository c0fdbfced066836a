"""`analyze`: score a network once, then search a policy for each budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mpq.analyze.cost import Allocation
from mpq.analyze.drop import Measured
from mpq.analyze.explain import build_policy, locked_widths
from mpq.analyze.limits import LIMITS
from mpq.analyze.perturb import perturb
from mpq.analyze.score import LABELLED, METRICS, Metric, Scoring
from mpq.analyze.search import Search, candidates
from mpq.analyze.validate import Judged, Simulator, Validation
from mpq.analyze.validate import validate as measure_scores
from mpq.batch import inputs_of, joined, moved, rows
from mpq.calls import Inputs, count, to_device
from mpq.data import sample_indices
from mpq.diagnose.tensors import measure
from mpq.errors import DataError, PolicyError, UsageError, nearest
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import classifier, stated
from mpq.latency import LatencyProfile
from mpq.layers import LayerChoice, Widths
from mpq.metrics.builtin import NAMES
from mpq.pipeline.analysis import Analysis, Choice
from mpq.pipeline.anything import batches_of
from mpq.pipeline.dropping import DropMeter
from mpq.pipeline.evaluating import evaluation
from mpq.pipeline.scoring import scores_of
from mpq.pipeline.sizing import excess, sized, taking
from mpq.pipeline.subject import Subject
from mpq.pipeline.wishes import Wishes
from mpq.policy import Constraints, DataInfo, Policy
from mpq.rundir import Run
from mpq.target import Target
from mpq.targets import get_target
from mpq.trusted import is_name

logger = logging.getLogger(__name__)
DEFAULT_EFFECTIVE_BITS = 4.8
MINIMIZE = dict(zip(("bits", "size", "bops", "activation", "latency"), LIMITS, strict=True))
"""What users call the limits that `max_drop` makes small."""
VALIDATION_IMAGES = 500


@dataclass(frozen=True)
class Analyzing:
    """How a network is scored and searched, whatever the budgets.

    Args:
        scoring: the metric, and the widths to choose from.
        samples: training images to score on.
        target: runtime to plan for; None: that of this computer.
        locked: a policy whose locked entries are kept.
        profile: measured times, for `max_latency_ms`.
        minimize: the limit that `max_drop` makes as small as it can, and that the front is over.
        rescore: score anew whatever there is.
        validate: random configurations to measure the scores against, on validation images.
    """

    scoring: Scoring = field(default_factory=Scoring)
    samples: int = 512
    target: str | None = None
    locked: Policy | None = None
    profile: LatencyProfile | None = None
    minimize: str = "effective_bits"
    rescore: bool = False
    validate: int = 0


def find_policy(
    subject: Subject,
    constraints: Constraints | Sequence[Constraints],
    how: Analyzing | None = None,
    run: Run | None = None,
) -> Analysis:
    """Score a network's layers once and choose their widths for each budget.

    Args:
        subject: the network and its data; without data the metric becomes `sqnr`.
        constraints: budgets; none at all means 4.8 effective bits, or a fifth of the way up
            from the narrowest width where that has more. Of several, each gets a policy.
        how: all else; None: `Analyzing()`.
        run: its seed draws the images that are looked at, its folder may hold scores that fit, and
            its device scores and validates; `ptq` runs on the CPU.

    Raises:
        InfeasibleError: no widths meet the budgets.
        PolicyError: widths that the target does not have, locks that do not fit the network.
        DataError: `max_drop` without data.
    """
    budgets = [constraints] if isinstance(constraints, Constraints) else constraints
    work = _Work(subject, how or Analyzing(), run or Run())
    usual = _usual(work.how.scoring.widths["weight"])
    return work.find([b if b.budgets() or b.max_drop is not None else usual for b in budgets])


def warn_elsewhere(profile: LatencyProfile | None, target: Target) -> None:
    """Say so where a profile is of another target than the policy is for."""
    if profile is None or profile.target in ("", target.name, *target.members):
        return
    logger.warning(
        "the profile was measured for %s, the policy is for %s", profile.target, target.name
    )


def _usual(widths: Iterable[int]) -> Constraints:
    """The budget where none is given: 4.8 bits, or as near the narrowest where that has more."""
    least, *wider = sorted(set(widths))
    above = wider[0] if wider else least
    return Constraints(effective_bits=max(DEFAULT_EFFECTIVE_BITS, least + (above - least) / 5))


@dataclass(frozen=True)
class _Work:
    """One analysis."""

    subject: Subject
    how: Analyzing
    run: Run

    def find(self, budgets: Sequence[Constraints]) -> Analysis:
        """Score, search each budget, and the front."""
        how, names, target = self.how, _names(budgets), get_target(self.how.target)
        widths = _candidates(how.scoring, target)
        warn_elsewhere(how.profile, target)
        graph = self.subject.graph()
        locked = locked_widths(how.locked, graph.layers) if how.locked else {}
        scoring, images, labels = self._images()
        scores, place = scores_of(graph, images, labels, scoring, run=self.run, rescore=how.rescore)
        search = Search(scores, target, widths, locked, how.profile)
        search = sized(search, graph, lambda one: self._policy(search, budgets[0], graph, one))
        measured: list[Measured] = []
        choices = [
            Choice(name, *self._solve(search, budget, graph, measured))
            for name, budget in zip(names, budgets, strict=True)
        ]
        found = [choice.allocation for choice in choices]
        return Analysis(
            choices=tuple(choices),
            sensitivity=search.scores,
            front=search.front(budgets[0], sweep=how.minimize, also=found),
            sweep=how.minimize,
            scores_from=place,
            measured=tuple(measured),
            validation=self._validate(search, graph, images) if how.validate else None,
            tensors=measure(
                graph,
                images.cpu() if isinstance(images, Tensor) else None,
                scoring.bits,
                choices[0].policy,
            ),
            judge=self.subject.judging.metric.name if self.subject.judging else "",
        )

    def _images(self) -> tuple[Scoring, Inputs | None, Any]:
        """The images to score on; without any, the metric is the one that needs none."""
        scoring, samples, seed = self.how.scoring, self.how.samples, self.run.seed
        if scoring.loss is not None:
            batch = moved(self._batch(samples), self.run.device)
            return scoring, inputs_of(batch), batch
        if self.subject.data is None:
            if scoring.metric != "sqnr":
                logger.warning("without data, layers are scored by the SQNR of their weights")
            return replace(scoring, metric="sqnr"), None, None
        if scoring.metric not in LABELLED:
            images = self.subject.sample(samples, seed, "scoring")
            return scoring, to_device(images, self.run.device), None
        images, labels = self.subject.labelled(self.subject.data.train, samples, seed)
        return scoring, to_device(images, self.run.device), labels

    def _batch(self, samples: int) -> Any:
        """What the user's loss takes, of so many images: batches of their own, or labelled images.

        Raises:
            DataError: there are neither.
        """
        if self.subject.batches is not None:
            found, seen = [], 0
            for batch in batches_of(self.subject.batches.train, samples, self.run.seed):
                found.append(batch)
                seen += count(inputs_of(batch))
                if seen >= samples:
                    break
            if not found:
                raise DataError("batches must give at least one. Got none.")
            return rows(joined(found), slice(samples), seen)
        data = self.subject.require_data("--loss")
        data.require_labels("--loss without --batches")
        return self.subject.labelled(data.train, samples, self.run.seed)

    def _solve(
        self, search: Search, budget: Constraints, graph: QuantGraph, measured: list[Measured]
    ) -> tuple[Policy, Allocation]:
        """What a search finds; again with the bytes that its file has above the budget."""
        drop = None
        if budget.max_drop is None:
            found = search.allocate(budget)
        else:
            meter = DropMeter(self.subject, graph, relative=budget.drop_type == "relative")
            tried = search.least(
                budget, meter.drop, minimize=self.how.minimize, progress=self.run.phase("measuring")
            )
            measured += [replace(m, interval=meter.intervals.get(id(m.allocation))) for m in tried]
            found, drop = tried[0].allocation, tried[0].drop
        policy = self._policy(search, budget, graph, found, drop)
        most = budget.max_size_mb
        if most is not None and (more := excess(graph, policy, 1e6 * most)) > 0:
            return self._solve(taking(search, more), budget, graph, measured)
        return policy, found

    def _policy(
        self,
        search: Search,
        budget: Constraints,
        graph: QuantGraph,
        found: Allocation,
        drop: float | None = None,
    ) -> Policy:
        samples, kinds = search.scores.samples, stated(graph.outputs)
        policy = build_policy(
            found,
            search.scores,
            model=self.subject.info,
            data=DataInfo(name=self.subject.data_name, samples=samples, seed=self.run.seed),
            constraints=budget,
            target=search.target.name,
            base=self.how.locked,
            measured_drop=drop,
        )
        return policy.replace(outputs=kinds) if kinds else policy

    def _validate(self, search: Search, graph: QuantGraph, scored: Inputs | None) -> Validation:
        """Measure random configurations on images that were not scored."""
        data, how, run = self.subject.require_data("--validate"), self.how.scoring, self.run
        assert search.widths is not None
        split = data.validation if len(data.validation) else data.compared
        if classifier(graph.outputs):
            images, truth = self.subject.labelled(split, VALIDATION_IMAGES, run.seed)
            labels: Tensor | None = truth.to(run.device)
        else:
            picked = sample_indices(split, VALIDATION_IMAGES, run.seed)
            images, labels = self.subject.tensor(split.read(picked)), None
        noise = perturb(
            graph,
            scored,
            weight_bits=how.widths["weight"],
            activation_bits=how.widths["activation"],
            rounding=how.rounding,
        )
        judged = self._judged(graph)
        return measure_scores(
            Simulator(noise, to_device(images, run.device), labels, metric=judged),
            search.scores,
            search.widths,
            count=self.how.validate,
            seed=run.seed,
            progress=run.phase("validating"),
        )

    def _judged(self, graph: QuantGraph) -> tuple[str, Judged] | None:
        """What configurations lose by the metric that was asked for."""
        found = evaluation(self.subject, graph.outputs, VALIDATION_IMAGES)
        if found is None:
            return None
        before = found.metric.value(found.parts(self.subject.module))

        def lost(answer: Callable[[Any], Any]) -> float:
            with torch.no_grad():
                after = found.metric.value(found.parts_of(answer, self.run.device))
            return before - after if found.metric.higher else after - before

        return found.metric.name, lost


def divided(wishes: Wishes) -> tuple[Metric, Wishes]:
    """Of the metrics that are named, how layers are scored, and what answers are judged by.

    Raises:
        UsageError: there are two of a kind, or a name of neither.
    """
    named = wishes.metric if isinstance(wishes.metric, tuple | list) else (wishes.metric,)
    scores = [m for m in METRICS if m in [n for n in named if isinstance(n, str)]]
    judges = [n for n in named if n is not None and not (isinstance(n, str) and n in METRICS)]
    for name in judges:
        if isinstance(name, str) and name not in NAMES and not is_name(name):
            raise UsageError(
                f"--metric must be one of {', '.join(METRICS)} (how layers are scored), or of "
                f"{', '.join(NAMES)}, module:function (what answers are judged by). Got {name!r}"
                f"{nearest(name, (*METRICS, *NAMES))}"
            )
    if len(scores) > 1 or len(judges) > 1:
        raise UsageError(
            "--metric takes one of a kind: how layers are scored "
            f"({', '.join(METRICS)}), and what answers are judged by. Got "
            f"{', '.join(map(str, scores if len(scores) > 1 else judges))}."
        )
    return (scores or METRICS)[0], replace(wishes, metric=judges[0] if judges else None)


def _names(budgets: Sequence[Constraints]) -> list[str]:
    """File names of the policies: the first is `policy.yaml`, the others say their budget."""
    named = [f"policy-{c.effective_bits:g}.yaml" for c in budgets[1:]]
    if len(set(named)) < len(named):
        raise UsageError(f"budgets must differ from each other. Got {', '.join(named)} twice.")
    return ["policy.yaml", *named]


def _candidates(scoring: Scoring, target: Target) -> list[Widths]:
    """The pairs of widths, known to the target before any work is done for them."""
    pairs = candidates(scoring.bits, scoring.act_bits)
    if not pairs:
        raise PolicyError(
            f"--bits and --act-bits must give a pair of widths, and 16-bit weights go with 16-bit "
            f"activations only. Got {list(scoring.bits)} and {list(scoring.act_bits)}. Try "
            "--bits 8,4 --act-bits 8."
        )
    for pair in pairs:
        target.support(LayerChoice.at("any", *pair))
    return pairs
