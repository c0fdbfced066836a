"""The study at work: one stage after another, and the results written when a run ends."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import networks, quantized, results
from benchmarks.study.clock import Clock
from benchmarks.study.plan import Plan
from benchmarks.study.shelf import Result, Shelf
from benchmarks.study.speed import measure_speed
from benchmarks.study.stages import Stage, select, stages_of
from mpq.checkpoint import load_model
from mpq.data import DataSet
from mpq.errors import UsageError
from mpq.export.bench import Timing, bench
from mpq.pipeline.ranking import Ranking, rank
from mpq.pipeline.subject import DataSource
from mpq.rundir import Run

logger = logging.getLogger(__name__)
SAMPLE = 64


@dataclass(frozen=True)
class Study:
    """What every stage needs.

    Args:
        plan: what is to be made.
        shelf: the folders of the stages.
        kept: the folder of the results.
        device: where networks are trained and scored, `cpu` or `cuda`.
        clock: when to stop.
        tell: told what is being done.
        from_kept: students of rows in `kept` are taken from there and not trained again.
    """

    plan: Plan
    shelf: Shelf
    kept: Path
    device: str
    clock: Clock
    tell: networks.Tell
    from_kept: bool = False

    def run(self, only: Sequence[str] = ()) -> None:
        """Make what is missing of the stages that `only` selects.

        Raises:
            TimeUpError: the limit was reached; the finished stages are kept, the one begun resumes.
            MpqError: what a stage refuses.
        """
        data = networks.opened(self.plan.data)
        every = stages_of(self.plan, data_key(data))
        given = results.kept_networks(self.kept, every) if self.from_kept else {}
        stages = {s.name: s for s in select(every, only, given)}
        self._check_classes(stages.values(), len(data.classes))
        with self.shelf.locked():
            results.begin(self.kept, self.plan)
            made: dict[str, Result] = {}
            try:
                for number, stage in enumerate(stages.values(), start=1):
                    found = self.shelf.result(stage)
                    if found is None:
                        self.clock.ask()
                        self.tell(f"[{number}/{len(stages)}] {stage.name}")
                        make = partial(self._make, stage, stages, made)
                        if stage.name in given:
                            make = partial(self._take, stage, given[stage.name])
                        found = self._finish(stage, make)
                    made[stage.name] = found
            finally:
                results.write(self.plan, self.shelf, self.kept, every)

    def _finish(self, stage: Stage, make: Callable[[], Result]) -> Result:
        self.shelf.begin(stage)
        return self.shelf.finish(stage, make() | results.setting(self.device))

    def _take(self, stage: Stage, file: Path) -> Result:
        self.tell(f"  taken from {file}")
        return networks.take_network(self._job(stage), stage.of, file)

    def file(self, stage: Stage, name: str) -> Path:
        """A file of a finished stage."""
        return self.shelf.folder(stage) / name

    def _check_classes(self, stages: Iterable[Stage], classes: int) -> None:
        """Refuse teachers and students of other classes before hours of work."""
        for name in dict.fromkeys(s.of for s in stages if s.kind == "network"):
            part = self.plan.network(name)
            if part.checkpoint is None:
                continue
            path = networks.checkpoint_file(part.checkpoint)
            found = load_model(path, arch=part.arch).info.classes
            if found != classes:
                raise UsageError(
                    f"network {name} must tell the {classes} classes of {self.plan.data.name} "
                    f"apart, but {path} has {found}. Name a checkpoint for these images."
                )

    def _make(self, stage: Stage, by_name: Mapping[str, Stage], made: dict[str, Result]) -> Result:
        if stage.kind == "network":
            return self._network(stage, by_name)
        if stage.kind == "speed":
            return measure_speed(self._job(stage), [n.name for n in self.plan.networks])
        if stage.kind == "row":
            return self._row(stage, by_name, made)
        if stage.kind == "rank":
            return self._rank(stage)
        if stage.kind == "latency":
            return self._latency(stage, by_name)
        return self._test(stage, by_name)

    def _network(self, stage: Stage, by_name: Mapping[str, Stage]) -> Result:
        part = self.plan.network(stage.of)
        needs = {by_name[n].of: self.file(by_name[n], networks.FILE) for n in stage.needs}
        return networks.make_network(
            self._job(stage),
            stage.of,
            start=needs[part.start] if part.start else None,
            teachers=[needs[t] for t in part.teachers],
        )

    def _job(self, stage: Stage) -> networks.Job:
        return networks.Job(
            self.plan,
            self.shelf.folder(stage),
            stage.seed,
            self.device,
            self.shelf.root / "answers",
            self.clock,
            self.tell,
        )

    def _row(self, stage: Stage, by_name: Mapping[str, Stage], made: dict[str, Result]) -> Result:
        row = self.plan.row(stage.of)
        needs = {by_name[n].of: by_name[n] for n in stage.needs}
        candidates = [needs[n] for n in row.networks]
        chosen = max(candidates, key=lambda s: made[s.name]["validation_top1"] or 0.0)
        found = quantized.make_row(
            self._job(stage),
            row,
            network=self.file(chosen, networks.FILE),
            teachers=[self.file(needs[t], networks.FILE) for t in row.teachers],
        )
        return found | {"network": chosen.of, "network_stage": chosen.name}

    def _rank(self, stage: Stage) -> Result:
        part = self.plan.rank
        assert part is not None
        how = Ranking(part.effective_bits, recipe=self.plan.recipe(part.recipe))
        folder, data = self.shelf.folder(stage), self.plan.data
        # Candidates are trained here, so that training images held out are there to measure on.
        source = DataSource(data.name, holdout=data.holdout or None)
        run = Run(folder, stage.seed, self.device, resume=(folder / "rank.json").is_file())
        rows = rank(part.candidates, source, how, run)
        return {"rows": rows}

    def _latency(self, stage: Stage, by_name: Mapping[str, Stage]) -> Result:
        """All files of the table side by side, the float one first, in one process."""
        rows = [by_name[n] for n in stage.needs]
        floats = [s for s in rows if self.plan.row(s.of).method == "float"]
        ordered = [*floats, *(s for s in rows if s not in floats)]
        paths = [self.file(s, quantized.MODEL) for s in ordered]
        measured = bench(
            paths,
            images=None,
            float_file=paths[0] if floats else None,
            timing=Timing(runs=self.plan.latency_runs),
        )
        times = {
            stage.of: {"ms": row.latency_ms.median, "ratio": row.ratio_to_float}
            for stage, row in zip(ordered, measured, strict=True)
        }
        return {"times": times}

    def _test(self, stage: Stage, by_name: Mapping[str, Stage]) -> Result:
        """The test images, read once for a finished row."""
        (row,) = (by_name[n] for n in stage.needs)
        path = self.file(row, quantized.MODEL)
        network = next(by_name[n] for n in row.needs if by_name[n].kind == "network")
        subject = networks.load_subject(self.file(network, networks.FILE), self.plan.data)
        data = subject.require_data("the study")
        found: Result = {
            "n": len(data.test),
            "test_top1": quantized.measured(path, subject, "test"),
        }
        half, n = len(data.validation), len(data.test)
        if self.plan.data.choose != "holdout" and half == n // 2:  # a limit may leave no halves
            first, both = quantized.measured(path, subject, "validation"), found["test_top1"]
            found["test_second_half"] = round((both * n - first * half) / (n - half), 3)
        return found


def data_key(data: DataSet) -> str:
    """Short text that differs for other images, splits or labels."""
    told: list[Any] = [data.name, len(data.classes)]
    for split in (data.train, data.validation, data.test):
        few = np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(np.int64)
        told += [len(split), zlib.crc32(np.ascontiguousarray(split.labels).tobytes())]
        told.append(zlib.crc32(np.ascontiguousarray(split.read(few)).tobytes()))
    return " ".join(map(str, told))
