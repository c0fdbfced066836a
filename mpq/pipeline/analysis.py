"""What an analysis found, and the files of a run that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq import files, origins, rundir
from mpq.analyze.cost import Allocation
from mpq.analyze.drop import Measured
from mpq.analyze.sensitivity import Sensitivity
from mpq.analyze.validate import Validation
from mpq.policy import Policy
from mpq.report.plots import pareto_plot, png, sensitivity_plot, validation_plot
from mpq.staging import together


@dataclass(frozen=True)
class Choice:
    """The answer to one budget: its policy file's name, the policy, and what it costs."""

    file: str
    policy: Policy
    allocation: Allocation


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Args:
        choices: one for each budget, the first of which is `policy.yaml`.
        sensitivity: what they were solved from.
        front: the Pareto front, with all choices on it.
        sweep: the limit that the front is over.
        scores_from: the file that the scores came from; None where they were made now.
        measured: what a search for an accuracy measured on the way.
        validation: the scores against measurements, where that was asked for.
    """

    choices: tuple[Choice, ...]
    sensitivity: Sensitivity
    front: list[Allocation]
    sweep: str = "effective_bits"
    scores_from: Path | None = None
    measured: tuple[Measured, ...] = ()
    validation: Validation | None = None

    @property
    def policy(self) -> Policy:
        """The policy of the first budget."""
        return self.choices[0].policy

    @property
    def allocation(self) -> Allocation:
        """The configuration of the first budget."""
        return self.choices[0].allocation


def write_analysis(found: Analysis, folder: Path, *, force: bool) -> None:
    """Write the policies, `sensitivity.json` and both pictures, as one step.

    Raises:
        UsageError: a policy is there already and `force` is off.
    """
    for choice in found.choices:
        rundir.refuse_overwrite(folder / choice.file, force)
    data = analysis_json(found)
    with together(rundir.touch_run(folder)) as aside:
        files.write_json(aside / "sensitivity.json", data)
        files.write_bytes(aside / "sensitivity.png", png(sensitivity_plot(data)))
        files.write_bytes(aside / "pareto.png", png(pareto_plot(data)))
        if found.validation:
            truth = found.validation.to_json()
            files.write_json(aside / "validation.json", truth)
            files.write_bytes(aside / "validation.png", png(validation_plot(truth)))
        for choice in found.choices:
            files.write_text(aside / choice.file, choice.policy.to_yaml())
        _note(aside, folder, found)


def _note(aside: Path, folder: Path, found: Analysis) -> None:
    """Note what the files of an analysis were made from."""
    model, scores = found.policy.model, "sensitivity.json"
    data = {origins.WEIGHTS: model.sha256 if model else "", "data": found.policy.data.name}
    made = {scores: origins.identity(aside / scores), **data}
    noted = {path.name: data if path.name == scores else made for path in aside.iterdir()}
    origins.note(aside, folder, "analyze", noted)


def analysis_json(found: Analysis) -> dict[str, Any]:
    """The content of `sensitivity.json`."""
    data = found.sensitivity.to_json()
    data["sweep"] = found.sweep
    data["front"] = [point.to_json() for point in found.front]
    data["chosen"] = {name: list(pair) for name, pair in found.allocation.widths.items()}
    data["choices"] = [
        {"file": c.file, "widths": {n: list(p) for n, p in c.allocation.widths.items()}}
        for c in found.choices
    ]
    data["measured"] = [{**m.allocation.to_json(), "drop": m.drop} for m in found.measured]
    return data
