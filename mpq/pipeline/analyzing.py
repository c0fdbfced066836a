"""`analyze`: sensitivity, search, and the policy file with its evidence and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpq import files, rundir
from mpq.analyze.cost import Widths
from mpq.analyze.explain import build_policy, locked_widths
from mpq.analyze.score import Metric, score_layers
from mpq.analyze.search import Allocation, allocate, candidates, pareto_front
from mpq.analyze.sensitivity import Sensitivity
from mpq.errors import PolicyError
from mpq.pipeline.subject import Subject
from mpq.policy import Constraints, DataInfo, Policy
from mpq.report.plots import pareto_plot, png, sensitivity_plot
from mpq.target import Target, get_target

logger = logging.getLogger(__name__)
DEFAULT_EFFECTIVE_BITS = 4.8
FILES = ("policy.yaml", "sensitivity.json", "sensitivity.png", "pareto.png")


@dataclass(frozen=True)
class Analysis:
    """What an analysis found."""

    policy: Policy
    sensitivity: Sensitivity
    allocation: Allocation
    front: list[Allocation]


def find_policy(
    subject: Subject,
    constraints: Constraints,
    *,
    bits: Sequence[int] = (8, 4),
    act_bits: Sequence[int] = (8,),
    metric: Metric = "fisher",
    samples: int = 512,
    seed: int = 0,
    target: str = "onnxruntime-cpu",
    locked: Policy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Score a network's layers and choose their widths.

    Args:
        subject: the network and its data; without data the metric becomes `sqnr`.
        constraints: budgets; none at all means 4.8 effective bits.
        bits: weight widths to choose from; 16 brings 16-bit activations with it.
        act_bits: activation widths to choose from.
        metric: sensitivity metric.
        samples: training images to score on.
        seed: of the sample and of the scoring.
        target: runtime to plan for.
        locked: a policy whose locked entries are kept.
        progress: told (done, all).

    Raises:
        InfeasibleError: no widths meet the budgets.
        PolicyError: widths that the target does not have, locks that do not fit the network.
    """
    runtime, pairs = get_target(target), _pairs(bits, act_bits, get_target(target))
    qg = subject.graph()
    kept = locked_widths(locked, qg.layers) if locked else {}
    images = None
    if subject.data is None:
        if metric != "sqnr":
            logger.warning("without data, layers are scored by the SQNR of their weights")
        metric = "sqnr"
    else:
        images = subject.sample(samples, seed, "analysis")
    if not constraints.model_dump(exclude_none=True):
        constraints = Constraints(effective_bits=DEFAULT_EFFECTIVE_BITS)
    sensitivity = score_layers(
        qg, images, bits=bits, act_bits=act_bits, metric=metric, seed=seed, progress=progress
    )
    chosen = allocate(sensitivity, constraints, target=runtime, pairs=pairs, locked=kept)
    front = pareto_front(
        sensitivity, constraints, target=runtime, pairs=pairs, locked=kept, also=[chosen]
    )
    info = DataInfo(name=subject.data_name, samples=0 if images is None else len(images), seed=seed)
    policy = build_policy(
        chosen,
        sensitivity,
        model=subject.info,
        data=info,
        constraints=constraints,
        target=target,
        base=locked,
    )
    return Analysis(policy, sensitivity, chosen, front)


def _pairs(bits: Sequence[int], act_bits: Sequence[int], target: Target) -> list[Widths]:
    """The candidates, known to the target before any work is done for them."""
    pairs = candidates(bits, act_bits)
    if not pairs:
        raise PolicyError(
            f"--bits and --act-bits must give a pair of widths, and 16-bit weights go with 16-bit "
            f"activations only. Got {list(bits)} and {list(act_bits)}. Try --bits 8,4 --act-bits 8."
        )
    for pair in pairs:
        target.support(*pair)
    return pairs


def write_analysis(found: Analysis, folder: Path, *, force: bool) -> None:
    """Write `policy.yaml`, `sensitivity.json` and both pictures.

    Raises:
        UsageError: a policy is there already and `force` is off.
    """
    rundir.refuse_overwrite(folder / "policy.yaml", force)
    rundir.touch_run(folder)
    data = found.sensitivity.to_json()
    data["front"] = [point.to_json() for point in found.front]
    data["chosen"] = {name: list(pair) for name, pair in found.allocation.widths.items()}
    files.write_json(folder / "sensitivity.json", data)
    files.write_bytes(folder / "sensitivity.png", png(sensitivity_plot(data)))
    files.write_bytes(folder / "pareto.png", png(pareto_plot(data)))
    files.write_text(folder / "policy.yaml", found.policy.to_yaml())
