"""`Plan`: a study as a YAML file, checked as a whole before anything is computed.

A plan names its data, recipes, networks (teachers and students alike), policies and rows. The order
of the rows is their priority: what a row needs is made just before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpq import zoo
from mpq.data import Normalization
from mpq.errors import UsageError, nearest
from mpq.policy import Constraints
from mpq.spec import weight_spec
from mpq.train.recipe import Recipe

PLANS = Path(__file__).parent / "plans"
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
Method = Literal["float", "ptq", "dynamic", "qat"]
UNPLANNED = ("float", "dynamic")
"""Methods without a policy: the network as it is, and onnxruntime's own dynamic form of it."""


class Strict(BaseModel):
    """A part of a plan: no key but these."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Strict):
    """Which images: `name` as for `--data`.

    `holdout` training images are kept out to choose by. Where a network saw them all, `choose:
    first half of test` chooses on the first half of the test images by official index; the figure
    on the other half then stands beside the one on all. `limit` takes so many training images only
    (and of the others as many at most): a rehearsal, not a result. `train` takes so many training
    images, each class equally often, and all others.
    """

    name: str
    holdout: int = Field(default=5000, ge=0)
    choose: Literal["holdout", "first half of test"] = "holdout"
    limit: int = Field(default=0, ge=0)
    train: int = Field(default=0, ge=0)


class Network(Strict):
    """A float network: read from `checkpoint`, or trained by `recipe`.

    A relative `checkpoint` lies beside the plan, or in `checkpoints/` of `$MPQ_DATA`. Training
    begins at random, or from the network `start`; with `teachers` it is distilled. It is trained
    anew for each seed of a row, unless it names the `seed` that all of them take.
    """

    name: Name
    arch: str | None = None
    checkpoint: str | None = None
    normalize: str | None = None
    start: str | None = None
    recipe: str | None = None
    teachers: tuple[str, ...] = ()
    seed: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.checkpoint is None) == (self.recipe is None):
            raise ValueError(f"network {self.name} must have a checkpoint or a recipe, not both")
        if self.recipe and not (self.arch or self.start):
            raise ValueError(f"network {self.name} must have an arch or a start to train")
        if self.checkpoint and (self.start or self.teachers):
            raise ValueError(f"network {self.name} has a checkpoint: start and teachers train")
        if self.arch and ":" not in self.arch:
            zoo.input_size(self.arch)  # refuses a name that there is not
        if self.normalize:
            Normalization.parse(self.normalize)
        return self


class Widths(Strict):
    """A policy: `uniform` (weight, activation) bits, or what a search finds within a `budget`.

    A uniform policy with activations below 8 bits leaves the image its 8; with `ends` the first
    and the last layer have these bits in weights and inputs, as published 4-bit figures have them;
    with `residual` the sums of shortcuts carry these bits (`DefaultSpec.residual_bits`).
    """

    uniform: tuple[int, int] | None = None
    ends: int | None = None
    residual: int | None = None
    bits: tuple[int, ...] = (8, 4)
    budget: Constraints | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.uniform is None) == (self.budget is None):
            raise ValueError("a policy must have uniform widths or a budget, not both")
        if (self.ends or self.residual) is not None and self.uniform is None:
            raise ValueError("ends and residual are those of a policy with uniform widths")
        for bits in (*self.bits, *(self.uniform or ()), self.ends or 8, self.residual or 8):
            weight_spec(bits)  # refuses a width that there is not
        wanted = self.budget and self.budget.effective_bits
        if wanted and not min(self.bits) <= wanted <= max(self.bits):
            raise ValueError(f"effective_bits must be within bits {self.bits}. Got {wanted:g}")
        return self


class Row(Strict):
    """A line of the table: a network (of several, the one that validation prefers), quantized.

    `dynamic` is what onnxruntime itself makes of the float file, all ranges found at run time: a
    convolutional network that mpq has quantized reads floats nowhere, so it has no such form.
    A `claim` is measured on the test images in the end; other rows on validation images alone. Of a
    row that is not to `keep`, `rows.csv` has the figures, and its files stay with its stage.
    `seeds` are those of this row, where it takes others than the plan. `unlabelled` names more
    images to learn, as for `--unlabelled`: of them only teachers speak.
    """

    name: Name
    title: str = ""
    network: str | tuple[str, ...]
    policy: str | None = None
    method: Method = "float"
    recipe: str | None = None
    teachers: tuple[str, ...] = ()
    unlabelled: str | None = None
    published: float | None = None
    claim: bool = True
    keep: bool = True
    section: str = "table"
    seeds: tuple[int, ...] = ()

    @property
    def networks(self) -> tuple[str, ...]:
        """The candidates."""
        return (self.network,) if isinstance(self.network, str) else self.network

    def takes(self, seed: int, plan: Plan) -> bool:
        """Whether it is made with this seed."""
        return seed in (self.seeds or plan.seeds)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.method in UNPLANNED) == (self.policy is not None):
            raise ValueError(
                f"row {self.name} must have a policy, unless its method is {' or '.join(UNPLANNED)}"
            )
        if (self.method == "qat") == (self.recipe is None):
            raise ValueError(f"row {self.name} must have a recipe if its method is qat, only then")
        if self.teachers and self.method != "qat":
            raise ValueError(f"row {self.name} has teachers, but its method {self.method} no use")
        if self.unlabelled and not self.teachers:
            raise ValueError(f"row {self.name} must have teachers to say what its unlabelled are")
        return self


class Rank(Strict):
    """`mpq rank`: architectures trained alike for a short time, or files, and quantized."""

    candidates: tuple[str, ...]
    recipe: str
    effective_bits: float = Field(default=4.8, ge=4, le=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.candidates:
            if not (":" in name or Path(name).is_file()):
                zoo.input_size(name)
        return self


class Plan(Strict):
    """A whole study; with `speed` the time of an epoch of each network is measured first."""

    name: Name
    about: str = ""
    data: Data
    seeds: tuple[int, ...] = (0,)
    recipes: dict[str, dict[str, Any]] = {}
    networks: tuple[Network, ...]
    policies: dict[str, Widths] = {}
    rows: tuple[Row, ...]
    rank: Rank | None = None
    speed: bool = False
    effort: Literal["fast", "good", "best"] = "good"
    latency_runs: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _unique("networks", [n.name for n in self.networks])
        _unique("rows", [r.name for r in self.rows])
        known = {n.name for n in self.networks}
        earlier: set[str] = set()
        for n in self.networks:
            used = [*n.teachers, *([n.start] if n.start else [])]
            _known(f"network {n.name}", used, earlier, "a network above it")
            _known(f"network {n.name}: recipe", [n.recipe] if n.recipe else [], self.recipes)
            earlier.add(n.name)
        for r in self.rows:
            _known(f"row {r.name}", [*r.networks, *r.teachers], known, "a network")
            _known(f"row {r.name}: policy", [r.policy] if r.policy else [], self.policies)
            _known(f"row {r.name}: recipe", [r.recipe] if r.recipe else [], self.recipes)
        if self.rank:
            _known("rank: recipe", [self.rank.recipe], self.recipes)
        for name in self.recipes:
            self.recipe(name)
        return self

    def recipe(self, name: str) -> Recipe:
        """A recipe of the plan: one of mpq's (`base`), with other values."""
        values = dict(self.recipes[name])
        return Recipe.load(str(values.pop("base", "plain"))).override(values)

    def epochs(self, recipe: str | None) -> int:
        """Epochs of a recipe of the plan; 0 without one."""
        return 0 if recipe is None else self.recipe(recipe).epochs

    def trained(self, network: str) -> int:
        """Epochs of a network, with those of the networks that it began as."""
        part = self.network(network)
        return self.epochs(part.recipe) + (self.trained(part.start) if part.start else 0)

    def code(self) -> list[str]:
        """The functions that build its networks, `package.module:function`, where it names some."""
        return [n.arch for n in self.networks if n.arch and ":" in n.arch]

    def network(self, name: str) -> Network:
        """A network by name."""
        return next(n for n in self.networks if n.name == name)

    def row(self, name: str) -> Row:
        """A row by name."""
        return next(r for r in self.rows if r.name == name)

    def rehearsal(self, images: int) -> Plan:
        """The same stages on so few images, one epoch each: to see that all of it runs."""
        short = {"epochs": 1, "cycle": 0, "progressive_epochs": 0, "warmup_epochs": 0}
        short |= {"batch": min(64, images), "accumulate": 1, "compile": False}
        return self.model_copy(
            update={
                "name": f"{self.name}-rehearsal",
                "data": self.data.model_copy(update={"limit": images}),
                "recipes": {name: values | short for name, values in self.recipes.items()},
                "latency_runs": 2,
                "rank": None,  # it takes all images
                "effort": "fast",
            }
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan: a file, or the name of one that comes with the study.

        Raises:
            UsageError: no such plan, not YAML, an unknown key, a value or a reference that is none.
        """
        file = Path(path)
        if not file.is_file():
            file = PLANS / f"{file.name.removesuffix('.yaml')}.yaml"
        if not file.is_file():
            known = sorted(p.stem for p in PLANS.glob("*.yaml"))
            raise UsageError(
                f"the plan must be a YAML file or one of {', '.join(known)}. "
                f"Got {str(path)!r}{nearest(str(path), known)}"
            )
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(
                f"plan {file} cannot be read: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(values, dict):
            raise UsageError(f"plan {file} must be a mapping. Got {type(values).__name__}.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            told = " ".join(_explain(e) for e in error.errors())
            raise UsageError(f"plan {file}: {told}") from None


def checkpoint_file(name: str) -> Path:
    """Where a checkpoint that a plan names lies.

    Raises:
        UsageError: in none of the places.
    """
    places = [Path(), PLANS, Path(os.environ.get("MPQ_DATA", ".")) / "checkpoints"]
    found = next((p / name for p in places if (p / name).is_file()), None)
    if found is None:
        listed = ", ".join(str(p) for p in places)
        raise UsageError(f"checkpoint {name} must be a file in one of {listed}. None has it.")
    return found


def _unique(what: str, names: list[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{what} must have different names. Got {twice[0]} twice")


def _known(where: str, names: list[str], known: Iterable[str], what: str = "one of these") -> None:
    listed = sorted(known)
    for name in names:
        if name not in listed:
            raise ValueError(
                f"{where} names {name!r}, which must be {what}: {', '.join(listed) or 'none'}"
                f"{nearest(name, listed)}"
            )


def _explain(item: Any) -> str:
    place = ".".join(str(p) for p in item["loc"])
    if item["type"] == "extra_forbidden":
        fields = {f for m in (Plan, Data, Network, Widths, Row, Rank, Constraints)
                  for f in m.model_fields}  # fmt: skip
        return f"{place} is not a known key{nearest(str(item['loc'][-1]), sorted(fields))}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{place}: {message}." if place else f"{message}."
