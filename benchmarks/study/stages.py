"""From a plan to the stages of the work, in order, each with the key of all that it depends on."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from benchmarks.study.plan import Plan, Row
from mpq.errors import UsageError, nearest

Kind = Literal["speed", "network", "row", "rank", "latency", "test"]
LATER = ("epoch_steps", "ends", "residual", "unlabelled")
"""Choices of recipes, policies and rows that came when work had been made: a key has them where
they are taken, so that what was made before them stays made."""


@dataclass(frozen=True)
class Stage:
    """A piece of work that has a folder of its own.

    Args:
        kind: what is done.
        name: of its folder, with the seed: `network-student-s0`.
        of: the network or row.
        seed: of everything random.
        needs: names of the stages before it.
        key: hash of its part of the plan, of the data, and of the keys of what it needs.
    """

    kind: Kind
    name: str
    of: str
    seed: int
    needs: tuple[str, ...]
    key: str

    @property
    def folder(self) -> str:
        """The name of its folder: another plan part has another folder."""
        return f"{self.name}-{self.key[:10]}"


def slug(text: str) -> str:
    """Text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def stages_of(plan: Plan, data: str) -> list[Stage]:
    """All stages of a plan; `data` tells these images from others."""
    return _Builder(plan, data).build()


class _Builder:
    """Collects stages, each once and after what it needs."""

    def __init__(self, plan: Plan, data: str) -> None:
        self.plan, self.data = plan, data
        self.found: dict[str, Stage] = {}

    def build(self) -> list[Stage]:
        if self.plan.speed:
            self.add("speed", "speed", "speed", self.plan.seeds[0], [], {})
        for section in dict.fromkeys(row.section for row in self.plan.rows):
            self.section(section)
        if self.plan.rank:
            self.add("rank", "rank", "rank", self.plan.seeds[0], [], self.ranking())
        return list(self.found.values())

    def section(self, section: str) -> None:
        """Its rows, seed after seed; then their latencies side by side; then their tests."""
        rows = [row for row in self.plan.rows if row.section == section]
        seeds = dict.fromkeys([*self.plan.seeds, *(s for row in rows for s in row.seeds)])
        made = [
            (row, seed, self.row(row, seed))
            for seed in seeds
            for row in rows
            if row.takes(seed, self.plan)
        ]
        claims = [(row, seed, stage) for row, seed, stage in made if row.claim]
        if not claims:
            return
        timed = list({row.name: stage for row, _, stage in reversed(claims)}.values())
        runs = {"runs": self.plan.latency_runs}
        name = f"latency-{slug(section)}"
        self.add("latency", name, section, self.plan.seeds[0], timed[::-1], runs)
        for row, seed, stage in claims:
            self.add("test", f"test-{row.name}-s{seed}", row.name, seed, [stage], {})

    def network(self, name: str, seed: int) -> str:
        part = self.plan.network(name)
        if part.recipe is None:
            seed = self.plan.seeds[0]  # a file is the same for every seed
        elif part.seed is not None:
            seed = part.seed
        teachers = [self.network(t, self.plan.seeds[0]) for t in part.teachers]
        start = [self.network(part.start, seed)] if part.start else []
        recipe = _content(self.plan.recipe(part.recipe)) if part.recipe else {}
        content = {"part": part.model_dump(mode="json", exclude={"seed"}), "recipe": recipe}
        return self.add(
            "network", f"network-{name}-s{seed}", name, seed, [*teachers, *start], content
        )

    def row(self, row: Row, seed: int) -> str:
        networks = [self.network(n, seed) for n in row.networks]
        teachers = [self.network(t, self.plan.seeds[0]) for t in row.teachers]
        widths = _content(self.plan.policies[row.policy]) if row.policy else {}
        recipe = _content(self.plan.recipe(row.recipe)) if row.recipe else {}
        told = {"title", "published", "section", "claim", "keep", "seeds"}  # these change no number
        content = {"part": _content(row, told), "widths": widths}
        content |= {"recipe": recipe, "effort": self.plan.effort}
        return self.add(
            "row", f"row-{row.name}-s{seed}", row.name, seed, [*networks, *teachers], content
        )

    def ranking(self) -> dict[str, Any]:
        assert self.plan.rank is not None
        recipe = _content(self.plan.recipe(self.plan.rank.recipe))
        return {"part": self.plan.rank.model_dump(mode="json"), "recipe": recipe}

    def add(
        self, kind: Kind, name: str, of: str, seed: int, needs: list[str], content: dict[str, Any]
    ) -> str:
        if name not in self.found:
            keys = [self.found[n].key for n in needs]
            told = {"data": self.data, "seed": seed, "needs": keys, "kind": kind, **content}
            key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
            self.found[name] = Stage(kind, name, of, seed, tuple(dict.fromkeys(needs)), key)
        return name


def _content(part: BaseModel, exclude: set[str] | None = None) -> dict[str, Any]:
    """The choices of a part of a plan that go into a key."""
    fields = type(part).model_fields
    values = part.model_dump(mode="json", exclude=exclude)
    return {k: v for k, v in values.items() if k not in LATER or v != fields[k].default}


def select(
    stages: Sequence[Stage], only: Iterable[str], given: Collection[str] = ()
) -> list[Stage]:
    """The stages that patterns name (all without any), with everything that they need.

    Stages that are `given` need nothing.

    A pattern is a stage's name or a glob of it, or a kind: `row-w4a8-s0`, `network-*`, `test`.

    Raises:
        UsageError: a pattern that names no stage.
    """
    patterns, by_name = list(only), {s.name: s for s in stages}
    wanted: set[str] = set() if patterns else set(by_name)
    for pattern in patterns:
        found = [
            s.name for s in stages if pattern == s.kind or fnmatch.fnmatchcase(s.name, pattern)
        ]
        if not found:
            raise UsageError(
                f"--only must name stages of the plan, or a kind of them. Got {pattern!r}"
                f"{nearest(pattern, by_name)}"
            )
        wanted.update(found)
    for stage in reversed(stages):
        if stage.name in wanted and stage.name not in given:
            wanted.update(stage.needs)
    return [s for s in stages if s.name in wanted]
