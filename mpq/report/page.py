"""One self-contained HTML page of a run folder: whatever is there is shown, nothing is fetched.

Tables and plots are made anew from the JSON files of the run, so the page cannot disagree with
them. The template is `page.html`, beside this file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from mpq import files, limits, origins, rundir
from mpq.errors import UsageError
from mpq.policy import Policy
from mpq.report import plots, tables
from mpq.report.grid import Grid, agreement_text, fixed

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: `pictures` are data URIs, `text` is shown as it is in the file."""

    title: str
    pictures: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    text: str = ""


def write_page(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        UsageError: no such folder, nothing of a run in it, or a file that is not what it should be.
        PolicyError: the same of `policy.yaml`.
    """
    path = folder / "report.html"
    files.write_text(path, page(folder))
    return path


def page(folder: Path) -> str:
    """The HTML of a run folder (errors as of `write_page`)."""
    if not folder.is_dir():
        raise UsageError(f"run folder {folder} does not exist. `mpq report RUN` takes a folder.")
    found = [make(folder) for make in SECTIONS]
    sections = [section for section in found if section is not None]
    if not sections:
        known = ", ".join(rundir.FILES)
        raise UsageError(f"{folder} must be a run folder, with at least one of {known}.")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render(
        name=folder.resolve().name, facts=facts(folder), sections=sections, files=_files(folder)
    )


def facts(folder: Path) -> list[tuple[str, str]]:
    """The figures that matter, as label and value: what stands on top of the page."""
    found = []
    if (folder / "policy.yaml").is_file():
        found += _policy_facts(Policy.load(folder / "policy.yaml"))
    rows = _content(folder, "bench.jsonl") or []
    if origins.is_of(folder / "bench.jsonl", "model.onnx"):
        found += _read(folder, "bench.jsonl", lambda: _bench_facts(rows))
    if certificate := _content(folder, "certificate.json"):
        found.append(("MACs that run as integers", f"{certificate['integer_macs_fraction']:.1%}"))
    if made_of := origins.made_of(folder / "model.onnx", rundir.QUANTIZED):
        found.append(("made of", made_of))
    if verify := _content(folder, "verify.json"):
        alike = verify["top1_agreement"]
        text = agreement_text(verify) if alike is None else f"{alike:.2%}"
        found.append(("agreement with the simulation", text))
    return found


def _policy_facts(policy: Policy) -> list[tuple[str, str]]:
    found = []
    if policy.model:
        found.append(("network", policy.model.arch))
    if policy.data.name != "none":
        found.append(("data", policy.data.name))
    if policy.result:
        found.append(("effective weight bits", f"{policy.result.effective_bits:.2f}"))
    return found


def _bench_facts(rows: list[Json]) -> list[tuple[str, str]]:
    named = {Path(row["file"]).name: row for row in rows}
    model, reference = named.get("model.onnx"), named.get("float.onnx")
    if model is None:
        return []
    size, top1 = f"{model['bytes']:,}", fixed(model["top1"], 2)
    if reference is not None:
        size += f" ({reference['bytes'] / model['bytes']:.1f} times smaller)"
        top1 += f" (float {fixed(reference['top1'], 2)})"
    found = [("top-1, percent", top1)] if model["top1"] is not None else []
    found.append(("bytes", size))
    if model["ratio_to_float"] is not None:
        found.append(("speed", f"{model['ratio_to_float']:.2f} times float"))
    return found


def _shown(
    title: str, name: str, *makers: Callable[[Any], Figure | Grid | None]
) -> Callable[[Path], Section | None]:
    """A section of plots and tables of one file of a run; None where they show nothing."""

    def section(folder: Path) -> Section | None:
        data = _content(folder, name)
        if data is None:
            return None
        made = _read(folder, name, lambda: [make(data) for make in makers])
        pictures = tuple(_data_uri(plots.png(one)) for one in made if isinstance(one, Figure))
        grids = tuple(one for one in made if isinstance(one, Grid))
        return Section(title, pictures, grids) if pictures or grids else None

    return section


_scores = _shown(
    "Sensitivity and search",
    "sensitivity.json",
    plots.sensitivity_plot,
    plots.pareto_plot,
    tables.configurations_table,
    tables.sensitivity_table,
)


def _sensitivity(folder: Path) -> Section | None:
    """What the scores say, or the pictures of them where the scores are gone."""
    paths = [folder / name for name in ("sensitivity.png", "pareto.png")]
    shown = [path for path in paths if path.is_file() and not origins.doubt(path)]
    pictures = tuple(_data_uri(path.read_bytes()) for path in shown)
    return _scores(folder) or (Section("Sensitivity", pictures) if pictures else None)


def _left_out(folder: Path) -> Section | None:
    """What the run holds and the page does not show, since it is of something else."""
    there = [folder / name for name in rundir.FILES if (folder / name).is_file()]
    reasons = {path.name: origins.doubt(path) for path in there if path.suffix.startswith(".json")}
    text = "".join(f"{reason}\n" for reason in reasons.values() if reason)
    return Section("Left out", text=text) if text else None


_curves = _shown("Training", "metrics.jsonl", plots.curves_plot)


def _training(folder: Path) -> Section | None:
    """The curves of `qat.pth`, where the model is not of another stage."""
    made_of = origins.made_of(folder / "model.onnx", rundir.QUANTIZED)
    return None if made_of == rundir.STAGES["ptq"] else _curves(folder)


def _policy(folder: Path) -> Section | None:
    path = folder / "policy.yaml"
    return Section("Policy", text=path.read_text(encoding="utf-8")) if path.is_file() else None


SECTIONS: tuple[Callable[[Path], Section | None], ...] = (
    _left_out,
    _shown("Accuracy, size and speed", "bench.jsonl", tables.bench_table),
    _sensitivity,
    _shown(
        "Scores against measurements",
        "validation.json",
        plots.validation_plot,
        tables.validation_table,
    ),
    _training,
    _shown("Certificate", "certificate.json", tables.certificate_table),
    _shown("Verification", "verify.json", tables.verify_table),
    _shown("Other runtimes", "portability.json", tables.portability_table),
    _policy,
)
"""The page from top to bottom; each gives None where the run lacks its file."""


def _files(folder: Path) -> list[tuple[str, str]]:
    there = [folder / name for name in rundir.FILES if name != "report.html"]
    there += sorted(folder.glob("policy-*.yaml"))
    return [(p.name, f"{p.stat().st_size:,}") for p in there if p.is_file()]


def _content(folder: Path, name: str) -> Any:
    """What a file of the run holds, of `.jsonl` its rows; None where there is nothing."""
    path = folder / name
    if not path.is_file() or origins.doubt(path):
        return None
    try:
        text = limits.read_text(path, UsageError)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line] or None
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(_not_right(path, f"It is not JSON: {error}")) from None


def _read(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; a file that lacks what every such file has is named."""
    try:
        return make()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"It lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(_not_right(folder / name, reason)) from error


def _not_right(path: Path, reason: str) -> str:
    writer = rundir.FILES[path.name]
    return f"{path} must be as `{writer}` writes it. {reason}. Write it again, or remove it."


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")
