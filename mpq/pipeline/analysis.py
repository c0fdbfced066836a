"""What an analysis found, and the files of a run that it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpq import files, limits, origins, rundir
from mpq.analyze.cost import Allocation, weight_bytes
from mpq.analyze.drop import Measured
from mpq.analyze.sensitivity import Sensitivity
from mpq.analyze.validate import Validation
from mpq.errors import PolicyError, UsageError
from mpq.keys import schema as policy_schema
from mpq.policy import Policy
from mpq.report.grid import counted
from mpq.report.plots import pareto_plot, png, sensitivity_plot, validation_plot
from mpq.report.tables import configurations_table, sensitivity_table
from mpq.shown import Shown
from mpq.staging import together

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = ".policy.schema.json"
FOR_EDITORS = f"# yaml-language-server: $schema={SCHEMA}"
"""The first line of a policy file, by which editors complete and check it."""

POINTS = ("top-1", "top5", "miou", "map", "agreement")
UNITS = {**dict.fromkeys(POINTS, "points of"), "psnr": "dB of"}
"""Of drops by metrics that mpq brings; of others what the metric itself counts in."""


@dataclass(frozen=True)
class Choice:
    """The answer to one budget: its policy file's name, the policy, and what it costs."""

    file: str
    policy: Policy
    allocation: Allocation


@dataclass(frozen=True, repr=False)
class Analysis(Shown):
    """What an analysis found.

    Args:
        choices: one for each budget, the first of which is `policy.yaml`.
        sensitivity: what they were solved from.
        front: the Pareto front, with all choices on it.
        sweep: the limit that the front is over.
        scores_from: the file that the scores came from; None where they were made now.
        measured: what a search for an accuracy measured on the way.
        validation: the scores against measurements, where that was asked for.
        tensors: what is unusual about weights and activations (`mpq.diagnose.tensors`).
        judge: the metric that drops were measured by; empty: top-1.
    """

    choices: tuple[Choice, ...]
    sensitivity: Sensitivity
    front: list[Allocation]
    sweep: str = "effective_bits"
    scores_from: Path | None = None
    measured: tuple[Measured, ...] = ()
    validation: Validation | None = None
    tensors: Mapping[str, Any] | None = None
    judge: str = ""

    @property
    def policy(self) -> Policy:
        """The policy of the first budget."""
        return self.choices[0].policy

    @property
    def allocation(self) -> Allocation:
        """The configuration of the first budget."""
        return self.choices[0].allocation

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policy of each budget."""
        return tuple(choice.policy for choice in self.choices)

    def to_json(self) -> dict[str, Any]:
        """The content of `sensitivity.json`."""
        return analysis_json(self)

    def shown(self) -> list[Any]:
        """The layers' scores, the front, and each policy in a line."""
        data = self.to_json()
        notes = [f"{choice.file}: {_said(choice.policy, self.judge)}{self._how_sure(choice)}"
                 for choice in self.choices]  # fmt: skip
        if truth := self.validation:
            notes.append(
                f"scores against {len(truth.truths)} measured policies: Spearman's rho "
                f"{truth.rho:.3f} ({counted(truth.images, 'validation image')})"
            )
            if truth.judge and truth.rho_judge is not None:
                notes.append(f"against their loss of {truth.judge}: rho {truth.rho_judge:.3f}")
        return [sensitivity_table(data), configurations_table(data), *notes]

    def _how_sure(self, choice: Choice) -> str:
        """The interval of the drop of a choice, where there is one."""
        for one in self.measured:
            if one.allocation is choice.allocation and one.interval is not None:
                low, high = one.interval
                return f" (95 %: {low:.3g} to {high:.3g})"
        return ""

    def plot(self, what: Literal["front", "sensitivity"] = "front") -> Figure:
        """The Pareto front with the choices on it, or the scores of the layers."""
        return (pareto_plot if what == "front" else sensitivity_plot)(self.to_json())

    def save(self, path: str | Path) -> Path:
        """Write policies, scores and pictures into a folder, replacing those that are there."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        _write(self, folder)
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Read what `save`, or `mpq analyze`, wrote into a folder.

        Raises:
            UsageError: there is no analysis.
            PolicyError: a policy or the scores are not what they should be.
        """
        place = Path(path) / "sensitivity.json"
        if not place.is_file():
            raise UsageError(f"{place} does not exist. `mpq analyze` and Analysis.save write it.")
        text = limits.read_text(place, PolicyError)
        data, scores = json.loads(text), Sensitivity.from_json(text, str(place))
        front = [_allocation(point, scores) for point in data["front"]]
        choices = []
        for one in data["choices"]:
            policy = Policy.load(place.parent / one["file"])
            found = next(a for a in front if a.to_json()["widths"] == one["widths"])
            choices.append(Choice(one["file"], policy, found))
        return cls(tuple(choices), scores, front, data["sweep"], scores_from=place)


def _allocation(point: Mapping[str, Any], scores: Sensitivity) -> Allocation:
    """A point of the front, of which the file says all but what follows from the widths."""
    widths = {name: (pair[0], pair[1]) for name, pair in point["widths"].items()}
    costs = ("effective_bits", "bitops", "bytes", "activation_bytes", "latency_ms")
    return Allocation(
        widths=widths,
        objective=point["predicted_drop"],
        weight_bytes=weight_bytes(scores.layers, widths),
        **{name: point[name] for name in costs},
    )


def _said(policy: Policy, judge: str = "") -> str:
    """What a search found, in a line; `judge` is the metric of the drop, of none top-1."""
    result = policy.result
    if result is None:
        return "no result"
    relative = policy.constraints.drop_type == "relative"
    named = judge if judge not in ("", "top1") else "top-1"
    kind = "% of float's" if relative else UNITS.get(named, "of")
    drop, digits = result.measured_drop, 2 if relative or named in UNITS else 4
    lost = "" if drop is None else f", measured drop {drop:.{digits}f} {kind} {named}"
    return (
        f"{result.status}: {result.effective_bits:.2f} effective bits, "
        f"{result.weight_bytes:,} bytes of weights, file of about {result.predicted_bytes:,}{lost}"
    )


def write_analysis(found: Analysis, folder: Path, *, force: bool) -> None:
    """Write the policies, `sensitivity.json` and both pictures, as one step.

    Raises:
        UsageError: a policy is there already and `force` is off.
    """
    for choice in found.choices:
        rundir.refuse_overwrite(folder / choice.file, force)
    _write(found, rundir.touch_run(folder))


def _write(found: Analysis, folder: Path) -> None:
    data = analysis_json(found)
    with together(folder) as aside:
        files.write_json(aside / "sensitivity.json", data)
        files.write_bytes(aside / "sensitivity.png", png(sensitivity_plot(data)))
        files.write_bytes(aside / "pareto.png", png(pareto_plot(data)))
        if found.validation:
            truth = found.validation.to_json()
            files.write_json(aside / "validation.json", truth)
            files.write_bytes(aside / "validation.png", png(validation_plot(truth)))
        if found.tensors:
            files.write_json(aside / "tensors.json", found.tensors)
        files.write_json(aside / SCHEMA, policy_schema())
        for choice in found.choices:
            files.write_text(aside / choice.file, f"{FOR_EDITORS}\n{choice.policy.to_yaml()}")
        _note(aside, folder, found)


def _note(aside: Path, folder: Path, found: Analysis) -> None:
    """Note what the files of an analysis were made from."""
    model, scores = found.policy.model, "sensitivity.json"
    data = {origins.WEIGHTS: model.sha256 if model else "", "data": found.policy.data.name}
    made = {scores: origins.identity(aside / scores), **data}
    names = (path.name for path in aside.iterdir() if path.name != SCHEMA)
    noted = {name: data if name == scores else made for name in names}
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
    data["measured"] = [_measured(m) for m in found.measured]
    if found.judge:
        data["judge"] = found.judge
    return data


def _measured(one: Measured) -> dict[str, Any]:
    interval = {} if one.interval is None else {"drop_interval": list(one.interval)}
    return {**one.allocation.to_json(), "drop": one.drop, **interval}
