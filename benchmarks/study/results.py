"""Results that stay: rows, table, curves, and the files that they were measured on.

Everything here is written from the stages' `done.json`, when a run ends; a file whose bytes
are the same is left alone.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.study import networks, quantized
from benchmarks.study.plan import Plan
from benchmarks.study.shelf import Result, Shelf, claim
from benchmarks.study.stages import Stage, slug
from mpq import files
from mpq.cpu import this_cpu
from mpq.errors import UsageError
from mpq.policy import Policy
from mpq.report.plots import png
from mpq.targets import this_target

logger = logging.getLogger(__name__)
LARGEST = 12 * 10**6
"""Bytes of a file that is kept beside the rows."""

COLUMNS = (
    "row", "title", "section", "network", "method", "policy", "seed", "epochs", "images_seen",
    "validation_top1", "test_top1", "test_second_half", "test_images", "bytes", "effective_bits",
    "latency_ms", "latency_ratio", "agreement", "integer_coverage", "published", "date", "machine",
    "target", "torch", "onnxruntime", "device", "code", "seconds", "file", "sha256", "checkpoint",
    "key",
)  # fmt: skip
"""Of `rows.csv`. Percent, bytes, milliseconds; `epochs` and `images_seen` are those of the network,
of those that it began as and of what followed; `latency_ratio` is times faster than the float file
in the same run."""

Line = dict[str, Any]


def setting(device: str = "cpu") -> dict[str, str]:
    """Date, machine and versions."""
    on = torch.cuda.get_device_name() if device == "cuda" else ""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{this_cpu().name}, {os.cpu_count()} cores" + (f", {on}" if on else ""),
        "target": this_target().name,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "device": device,
    }


def begin(kept: Path, plan: Plan) -> None:
    """Make the folder of the results, before hours of work that is to go there.

    Raises:
        UsageError: it belongs to another plan, or holds something else.
    """
    if kept.exists() and not kept.is_dir():
        raise UsageError(f"the results must go to a folder. Got {kept}, which is a file.")
    kept.mkdir(parents=True, exist_ok=True)
    claim(kept, plan.name)


def write(plan: Plan, shelf: Shelf, kept: Path, stages: Sequence[Stage]) -> None:
    """Write rows, table, curves and files of all that is finished, whoever made it when.

    Lines of `rows.csv` that belong to this very plan stay, also where their stages are not on this
    machine.
    """
    done = _Finished(plan, shelf, kept, stages)
    rows = [s for s in stages if s.kind == "row"]
    known = {line["key"]: line for line in read_csv(kept / "rows.csv")}
    found = {s: done.line(s) if s.name in done.made else known.get(s.key[:10]) for s in rows}
    lines = [_as_planned(plan, line) for line in found.values() if line is not None]
    if not lines:
        return
    told = plan.model_dump(mode="json", exclude_defaults=True)
    _replace(kept / "plan.yaml", yaml.safe_dump(told, sort_keys=False).encode())
    _replace(kept / "rows.csv", to_csv(lines).encode())
    ranked = done.made.get("rank", {}).get("rows", ())
    if ranked:
        files.write_json(kept / "rank.json", {"rows": ranked})
    _replace(kept / "table.md", table(plan, read_csv(kept / "rows.csv"), ranked).encode())
    if curves := done.curves(known.values()):
        _replace(kept / "curves.json", (json.dumps(curves, indent=1) + "\n").encode())
        files.write_bytes(kept / "curves.png", png(_curve_plot(plan, curves)))
    files.write_bytes(kept / "sizes.png", png(_size_plot(read_csv(kept / "rows.csv"))))


def _as_planned(plan: Plan, line: Line) -> Line:
    """A line with what the plan says of its row today and no key depends on."""
    row = plan.row(line["row"])
    told = {"title": row.title or row.name, "section": row.section, "published": row.published}
    return line | told | ({} if row.keep else {"file": None, "checkpoint": None})


class _Finished:
    """What the stages of a plan have given so far."""

    def __init__(self, plan: Plan, shelf: Shelf, kept: Path, stages: Sequence[Stage]) -> None:
        self.plan, self.shelf, self.kept = plan, shelf, kept
        self.stages = {s.name: s for s in stages}
        told = {s.name: shelf.told(s) for s in stages}
        self.made = {name: found for name, found in told.items() if found is not None}

    def line(self, stage: Stage) -> Line:
        """One line of `rows.csv`, with its files put beside it."""
        found = self.made[stage.name]
        row = self.plan.row(stage.of)
        student = self.made[found["network_stage"]]
        measured = self.made.get(f"latency-{slug(row.section)}", {})
        times = measured.get("times", {}).get(row.name, {})
        tested = self.made.get(f"test-{stage.of}-s{stage.seed}", {})
        line: Line = dict.fromkeys(COLUMNS)
        line |= {k: v for k, v in found.items() if k in line}
        trained = self.plan.trained(student["network"])
        line |= {"policy": row.policy, "epochs": found["epochs"] + trained}
        an_epoch = student["images_seen"] // max(1, student["epochs"])
        line["images_seen"] = found["images_seen"] + trained * an_epoch
        line |= {"test_top1": tested.get("test_top1"), "test_images": tested.get("n")}
        line["test_second_half"] = tested.get("test_second_half")
        line |= {"latency_ms": times.get("ms"), "latency_ratio": times.get("ratio")}
        kept = self._files(stage, found) if row.keep else {}
        return line | {"key": stage.key[:10]} | kept

    def _files(self, stage: Stage, found: Result) -> Line:
        """Copies of the model, its policy and the student's checkpoint, as far as small.

        The policy names the checkpoint beside it, if that is kept.
        """
        name, folder = f"{stage.of}-s{stage.seed}", self.shelf.folder(stage)
        network = self.stages[found["network_stage"]]
        source = self.shelf.folder(network) / networks.FILE
        target = self.kept / "networks" / f"{network.of}-s{network.seed}.pth"
        line: Line = {"checkpoint": _copy(source, target)}
        if found["method"] != "float":
            line["file"] = _copy(folder / quantized.MODEL, self.kept / "files" / f"{name}.onnx")
        if (folder / quantized.POLICY).is_file():
            policy = Policy.load(folder / quantized.POLICY)
            beside = f"../{line['checkpoint']}" if line["checkpoint"] else ""
            text = policy.replace(model=policy.model.replace(checkpoint=beside)).to_yaml()
            _replace(self.kept / "files" / f"{name}.yaml", text.encode())
        return line

    def curves(self, known: Iterable[Mapping[str, str]]) -> dict[str, list[dict[str, Any]]]:
        """The epochs of every training, by stage: of those here, and behind rows `known`."""
        path = self.kept / "curves.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        stay = behind(self.stages.values(), known)
        found = {}
        for name, stage in self.stages.items():
            if name in self.made and stage.kind in ("network", "row"):
                path = next(self.shelf.folder(stage).glob("**/metrics.jsonl"), None)
                if path is not None:
                    epochs = map(json.loads, path.read_text(encoding="utf-8").splitlines())
                    found[name] = [{k: e.get(k) for k in _CURVE} for e in epochs]
            if name not in found and name in stay and name in before:
                found[name] = before[name]
        return found


def behind(stages: Iterable[Stage], lines: Iterable[Mapping[str, str]]) -> set[str]:
    """Names of the stages that lines of `rows.csv` rest on: a row's key has all of theirs in it."""
    keys, order = {line["key"] for line in lines}, list(stages)
    found = {s.name for s in order if s.kind == "row" and s.key[:10] in keys}
    for stage in reversed(order):
        if stage.name in found:
            found.update(stage.needs)
    return found


def kept_networks(kept: Path, stages: Sequence[Stage]) -> dict[str, Path]:
    """The students of the rows in a results folder, by the stage that would train them again."""
    lines = read_csv(kept / "rows.csv")
    known, students = behind(stages, lines), {line["checkpoint"] for line in lines}
    names = {s.name: f"networks/{s.of}-s{s.seed}.pth" for s in stages if s.kind == "network"}
    return {
        name: kept / file
        for name, file in names.items()
        if name in known and file in students and (kept / file).is_file()
    }


_CURVE = ("epoch", "lr", "train_loss", "train_top1", "val_top1", "seconds")


def _copy(source: Path, target: Path) -> str | None:
    """Put a file there if it is small; returns its name below the results."""
    if source.is_file():
        if source.stat().st_size > LARGEST:
            logger.warning("%s is not kept: %d bytes", source, source.stat().st_size)
            return None
        _replace(target, source.read_bytes())
    elif not target.is_file():
        return None
    return f"{target.parent.name}/{target.name}"


def _replace(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        files.write_bytes(path, content)


def to_csv(lines: Sequence[Line]) -> str:
    """`rows.csv`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of `rows.csv`, as text; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interval(percent: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy in percent, measured on so many images.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    p, z = percent / 100, 1.96
    middle = p + z * z / (2 * count)
    reach = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    below, above = (100 * (middle + s * reach) / (1 + z * z / count) for s in (-1, 1))
    return max(0.0, below), min(100.0, above)


def table(plan: Plan, lines: Sequence[Mapping[str, str]], ranked: Sequence[Any] = ()) -> str:
    """`table.md`: the rows by section, seeds together, beside what was published."""
    parts = [f"# {plan.name}\n", f"{plan.about.strip()}\n"] if plan.about else [f"# {plan.name}\n"]
    for section in dict.fromkeys(line["section"] for line in lines):
        here = [line for line in lines if line["section"] == section]
        names = dict.fromkeys(line["row"] for line in here)
        rows = [_table_row([x for x in here if x["row"] == name]) for name in names]
        parts += [f"## {section}\n", _grid(_HEAD, rows)]
    if ranked:
        parts += ["## choice of student\n", _grid(_RANK, [_ranked(row) for row in ranked])]
    return "\n".join(parts)


_HEAD = ("", "top-1, test", "95 % interval", "validation", "published", "bytes", "effective bits")
_HEAD += ("times faster", "seeds")
_RANK = ("", "float", "8/4", "drop", "effective bits", "parameters")


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, without the columns that no row has anything in."""
    full = [at for at in range(len(head)) if at == 0 or any(row[at] for row in rows)]
    marks = [":".rjust(4, "-") if at else "---" for at in full]
    lines = [[head[at] for at in full], *([row[at] for at in full] for row in rows)]
    head_line, *others = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{head_line}|{'|'.join(marks)}|\n{''.join(others)}"


def _table_row(seeds: Sequence[Mapping[str, str]]) -> list[str]:
    """One configuration: means over its seeds, and the interval of all its test images."""
    first, tested = seeds[0], _mean(seeds, "test_top1")
    reach = ""
    if tested is not None:  # seeds share the test images: they do not narrow the interval
        low, high = interval(tested, int(first["test_images"]))
        reach = f"{low:.2f} to {high:.2f}"
    return [
        first["title"],
        _spread(seeds, "test_top1"),
        reach,
        _spread(seeds, "validation_top1"),
        _number(_mean(seeds[:1], "published")),
        f"{int(first['bytes']):,}",
        _number(_mean(seeds, "effective_bits")),
        _number(_mean(seeds[:1], "latency_ratio")),
        str(len(seeds)),
    ]


def _mean(lines: Sequence[Mapping[str, str]], column: str) -> float | None:
    values = [float(line[column]) for line in lines if line[column]]
    return sum(values) / len(values) if values else None


def _spread(lines: Sequence[Mapping[str, str]], column: str) -> str:
    """The mean over seeds, with the least and the greatest where there are several."""
    mean, values = _mean(lines, column), [float(line[column]) for line in lines if line[column]]
    if len(values) < 2:
        return _number(mean)
    return f"{_number(mean)} ({min(values):.2f} to {max(values):.2f})"


def _ranked(row: Mapping[str, Any]) -> list[str]:
    mixed = row["forms"]["mixed"]
    cells = [row["name"], _number(row["top1"]), _number(mixed["top1"])]
    return [*cells, _number(mixed["drop"]), _number(mixed["effective_bits"]), f"{row['params']:,}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _curve_plot(plan: Plan, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Validation by epochs and by hours of training, those of the network before it included.

    A line is the mean over seeds. Hours are those of the clock: the first student pays for answers
    that others find kept.
    """
    before = {f"network-{n.name}": f"network-{n.start}" for n in plan.networks if n.start}
    before |= {f"row-{r.name}": f"network-{r.networks[0]}" for r in plan.rows if r.recipe}
    figure = Figure(figsize=(12, 5), layout="constrained")
    by_epoch, by_hour = figure.subplots(1, 2, sharey=True)
    ends: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(stage.rpartition("-s")[0] for stage in curves):
        seeds = [e for stage, e in curves.items() if stage.rpartition("-s")[0] == name]
        shown = np.array([[e["val_top1"] for e in epochs] for epochs in seeds], dtype=float)
        seconds = np.mean([[e["seconds"] for e in epochs] for epochs in seeds], axis=0)
        epoch, hour = ends.get(before.get(name, ""), (0.0, 0.0))
        epochs, hours = epoch + 1 + np.arange(len(seconds)), hour + np.cumsum(seconds) / 3600
        ends[name] = epochs[-1], hours[-1]
        if not np.isnan(shown).all():
            by_epoch.plot(epochs, shown.mean(axis=0), ".-", label=name.partition("-")[2])
            by_hour.plot(hours, shown.mean(axis=0), ".-")
    by_epoch.set(xlabel="epochs", ylabel="top-1 in percent, validation")
    by_hour.set(xlabel="hours")
    for axes in (by_epoch, by_hour):
        axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def _configuration(line: Mapping[str, str]) -> str:
    return line["title"].removesuffix(", public checkpoint")


def _size_plot(lines: Sequence[Mapping[str, str]]) -> Figure:
    """Accuracy by configuration, the smallest file first; a cross where test was not read."""
    shown = [line for line in lines if line["test_top1"] or line["validation_top1"]]
    sizes: dict[str, float] = {}
    for line in shown:  # of one configuration, files differ by some hundred bytes
        sizes.setdefault(_configuration(line), int(line["bytes"]) / 1e3)
    order = sorted(sizes, key=lambda name: (sizes[name], name))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, section in enumerate(dict.fromkeys(line["section"] for line in shown)):
        mine = [line for line in shown if line["section"] == section]
        tested = [line for line in mine if line["test_top1"]]
        others = [line for line in mine if not line["test_top1"]]
        for points, read, mark in ((tested, "test", "o"), (others, "validation", "x")):
            places = [order.index(_configuration(line)) for line in points]
            values = [float(line[f"{read}_top1"]) for line in points]
            label = f"{section}, {read}" if points else None
            axes.plot(places, values, mark, color=f"C{number}", label=label)
    names = [f"{name}, {sizes[name]:.0f} kB" for name in order]
    axes.set_xticks(range(len(order)), names, rotation=30, ha="right", fontsize=7)
    axes.set_ylabel("top-1 in percent")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=7)
    return figure
