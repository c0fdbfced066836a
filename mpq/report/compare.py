"""The page of several runs side by side. What two runs do not share is not put into one plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpq import files
from mpq.errors import UsageError
from mpq.noise import interval
from mpq.report import charts
from mpq.report.contents import Contents
from mpq.report.grid import TOP1, Grid, agreement_text, columns, fixed, tiny
from mpq.report.headline import Json, measured, named
from mpq.report.render import Head, Part, Plot, Section, render
from mpq.report.tables import widths_text


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of several runs to a file and return its path.

    Raises:
        UsageError: fewer than two runs, or as `mpq.report.page.page`.
        PolicyError: a policy that cannot be read.
    """
    files.write_text(path, comparison(folders))
    return path


def comparison(folders: Sequence[Path]) -> str:
    """The HTML of several runs (errors as of `write_comparison`)."""
    if len(folders) < 2:
        raise UsageError(f"--compare needs two runs or more. Got {len(folders)}.")
    runs = _labelled([Contents(folder) for folder in folders])
    found = [make(runs) for make in (_left_out, _summary, _accuracy, _fronts, _widths)]
    sections = [section for section in found if section is not None]
    told = " and ".join([", ".join([*runs][:-1]), [*runs][-1]])
    head = Head(told, "mpq report \N{MIDDLE DOT} runs side by side", _alike(runs), "", ())
    return render(head, sections, f"runs {told}")


Runs = dict[str, Contents]


def _labelled(runs: Sequence[Contents]) -> Runs:
    """Runs by name; by path where two have the same."""
    names = [run.name for run in runs]
    alike = len(set(names)) < len(names)
    found = {str(run.folder) if alike else run.name: run for run in runs}
    if len(found) < len(runs):
        raise UsageError("--compare needs different runs. Got one of them twice.")
    return found


def _weights(run: Contents) -> str:
    return run.policy.model.sha256 if run.policy and run.policy.model else ""


def _data(run: Contents) -> str:
    return run.policy.data.name if run.policy else ""


def _alike(runs: Runs) -> str:
    """Whether they are of one network."""
    hashes = {_weights(run) for run in runs.values()}
    if len(hashes) == 1 and "" not in hashes:
        return "Runs of the same weights."
    return "These runs are of different weights: accuracies and sizes compare, scores do not."


def _left_out(runs: Runs) -> Section | None:
    reasons = [reason for run in runs.values() for reason in run.doubts()]
    return Section("left-out", "Left out", (Part("warnings", (reasons,)),)) if reasons else None


FIGURES = (
    "network", "data", "effective weight bits", "predicted drop", "top-1, percent",
    "95 % interval", "float on the same images", "images", "bytes of the file", "speed of float",
    "MACs that run as integers", "agreement with the simulation",
)  # fmt: skip


def _summary(runs: Runs) -> Section:
    figures = zip(FIGURES, *(_figures(run) for run in runs.values()), strict=True)
    grid = Grid("Runs side by side", columns("", *(f"#{label}" for label in runs)), tuple(figures))
    return Section("summary", "In figures", (Part.table(grid, open=True),))


def _figures(run: Contents) -> tuple[str, ...]:
    """The figures of a run, in the order of `FIGURES`."""
    policy, rows = run.policy, measured(run)
    model, plain = named(rows, "model.onnx"), named(rows, "float.onnx")
    result = policy.result if policy else None
    integer = run.read("certificate.json", lambda c: f"{c['integer_macs_fraction']:.1%}")
    speed = model["ratio_to_float"] if model else None
    return (
        policy.model.arch if policy and policy.model else "-",
        _data(run) or "-",
        fixed(result.effective_bits if result else None, 2),
        tiny(result.predicted_drop if result else None),
        *_top1(model, plain),
        _bytes(run, model),
        "-" if speed is None else f"{speed:.2f}x",
        integer or "-",
        (run.read("verify.json", agreement_text) or "-").removeprefix(TOP1),
    )


def _top1(model: Json | None, plain: Json | None) -> tuple[str, ...]:
    if model is None or model["top1"] is None:
        return ("-",) * 4
    low, high = interval(model["top1"], model["n"])
    reference = fixed(plain["top1"] if plain else None, 2)
    return (f"{model['top1']:.2f}", f"{low:.2f}..{high:.2f}", reference, f"{model['n']:,}")


def _bytes(run: Contents, model: Json | None) -> str:
    """Of the measured file, else of the file that is there, else as predicted."""
    if model is not None:
        return f"{model['bytes']:,}"
    if (path := run.path("model.onnx")) is not None:
        return f"{path.stat().st_size:,}"
    result = run.policy.result if run.policy else None
    return f"about {result.predicted_bytes:,}" if result else "-"


def _accuracy(runs: Runs) -> Section | None:
    """One plot of all that was measured on the same number of images of the same data."""
    found: dict[str, Json] = {}
    for label, run in runs.items():
        model = named(measured(run), "model.onnx")
        if model is not None and model["top1"] is not None:
            found[label] = model
    grounds = {(row["n"], _data(runs[label])) for label, row in found.items()}
    if len(found) < 2 or len(grounds) > 1:
        return None
    rows = list(found.values())
    spans = [interval(row["top1"], row["n"]) for row in rows]
    alt = "; ".join(
        f"{k}: {r['bytes'] / 1e3:,.0f} kB, top-1 {r['top1']:.2f} %" for k, r in found.items()
    )
    plot = Plot(charts.bench(rows, spans, list(found)), f"Accuracy over size. {alt}")
    return Section("accuracy", "Accuracy over size", (Part("plot", plots=(plot,)),))


def _scores(runs: Runs, read: Callable[[Any], Any]) -> dict[str, Any]:
    found = {label: run.read("sensitivity.json", read) for label, run in runs.items()}
    return {label: one for label, one in found.items() if one}


def _fronts(runs: Runs) -> Section | None:
    """The fronts of runs of the same weights and metric, whose predictions can be compared."""
    scores = _scores(runs, lambda s: s if s["front"] else None)
    same = {(_weights(runs[label]), one["metric"], one["samples"]) for label, one in scores.items()}
    if len(scores) < 2 or len(same) > 1 or "" in next(iter(same)):
        return None
    plot = Plot(charts.fronts(scores), f"Pareto fronts of {', '.join(scores)} over bytes")
    return Section("fronts", "Pareto fronts", (Part("plot", plots=(plot,)),), "Stars: chosen.")


def _widths(runs: Runs) -> Section | None:
    """Layer by layer; only runs that have the same layers share a table."""
    chosen = _scores(runs, lambda s: s.get("chosen"))
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, widths in chosen.items():
        groups.setdefault(tuple(widths), []).append(label)
    parts = tuple(
        _heat(layers, {k: chosen[k] for k in labels}) for layers, labels in groups.items()
    )
    return Section("widths", "Bits of each layer", parts) if parts else None


def _heat(layers: Sequence[str], chosen: dict[str, Any]) -> Part:
    rows = [
        (name, [(widths_text(one[name]), one[name][0] or "float") for one in chosen.values()])
        for name in layers
    ]
    return Part("heat", (list(chosen), rows))
