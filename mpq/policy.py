"""The policy file: what a person reads and edits, and what every later stage obeys.

Precedence: `default`, then each entry of `layers` from top to bottom; an entry names one layer by
its exact module path or several by a glob, and overrides field by field, so the last match wins. A
pattern that matches nothing and a key that is not known are errors that name the nearest name.
No torch here: a policy can be read where torch is absent.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mpq.errors import PolicyError, nearest
from mpq.fields import Float, Input, Spec
from mpq.files import write_text
from mpq.layers import LayerChoice
from mpq.limits import current, exceeded, read_named
from mpq.spec import QuantSpec, activation_spec, weight_spec
from mpq.targets import get_target, this_target
from mpq.yamltext import explain, mapping, section

CHANNELS = 1024
"""Of an image, at most."""
DropType = Literal["absolute", "relative"]
OutputKind = Literal["classes", "places", "sequence", "regression", "exact", "ignored"]
OUTPUT_KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
"""What an output of a network may be (`mpq.outputs`)."""


def _known_kind(value: object) -> object:
    if value not in OUTPUT_KINDS:
        known = ", ".join(OUTPUT_KINDS)
        raise ValueError(
            f"the kind of an output must be one of {known}. Got {value!r}"
            f"{nearest(str(value), OUTPUT_KINDS)}"
        )
    return value


class _Value(BaseModel):
    """What stands in a policy: never changed, and never there without having been validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def replace(self, **changes: object) -> Self:
        """The same with other values, validated as those of a file are.

        Raises:
            PolicyError: an unknown key, or a value out of its range or of the wrong form.
        """
        try:
            return self.model_validate(dict(self) | changes)
        except ValidationError as error:
            raise PolicyError(explain(error, type(self).__name__, _known_keys())) from None


class ModelInfo(_Value):
    """Which network the policy was made for.

    `arch` is a zoo or torchvision name or `package.module:factory`; `checkpoint` a path, relative
    to the policy file or to the working directory; `sha256` the hash of the weights
    (`mpq.checkpoint.weights_hash`); `input` is `[channels, height, width]` of its images, or
    `inputs` says by name what else it takes; `pictures` is how those of another size are brought to
    it, if it says so (`mpq.data.images.Fit`); `weights` is what `--weights` took of a file that
    holds several.
    """

    arch: str
    checkpoint: str = ""
    sha256: str = ""
    classes: int = Field(ge=1)
    input: tuple[int, int, int] = (3, 32, 32)
    normalize: str = "none"
    pictures: str | None = None
    weights: str | None = None
    inputs: dict[str, Input] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        """Refuse what could only be built in memory that nobody has."""
        channels, height, width = self.input
        if min(self.input) < 1 or channels > CHANNELS:
            raise ValueError(f"input must be [channels, height, width]. Got {list(self.input)}.")
        most = max((spec.values / CHANNELS for spec in (self.inputs or {}).values()), default=0)
        pixels = max(height * width, most) / 1e6
        for name, got in (("input_megapixels", pixels), ("classes", self.classes)):
            if got > getattr(current(), name):
                raise ValueError(exceeded("the network", name, f"{got:g}"))
        return self


class DataInfo(_Value):
    """Which data were looked at: `name` as for `--data`, calibration `samples`, `seed`."""

    name: str = "none"
    samples: int = Field(default=512, ge=0)
    seed: int = 0


class DefaultSpec(_Value):
    """Formats of a layer that no entry names.

    With `residual_bits`, what a sum reads has these bits, and layers of narrower activations read a
    rounded copy of it; without, they share one grid with the sum (as APoT and LCQ do not).
    """

    weight: Spec = weight_spec(8)
    activation: Spec = activation_spec(8)
    residual_bits: int | None = Field(default=None, ge=2, le=8)


class LayerPolicy(_Value):
    """One entry of `layers`: a path or glob, and what it sets (None leaves it as it is)."""

    name: str
    weight: Spec | None = None
    activation: Spec | None = None
    locked: bool | None = None
    reason: str = ""


class Constraints(_Value):
    """Budgets that the search was given, in any combination.

    Args:
        effective_bits: mean width of the weights.
        max_size_mb: the exported file, in MB (10^6 bytes).
        max_bops: 10^9 BitOps per image.
        max_activation_mb: activations alive at one time for one image, in MB, each tensor packed
            at the width it is read at (`mpq.analyze.cost.activation_bytes`).
        max_latency_ms: milliseconds per batch, as a latency profile predicts them.
        max_drop: measured loss of top-1 that is still allowed, in points (`absolute`) or in percent
            of the float accuracy (`relative`).
        drop_type: how `max_drop` is meant; None is absolute.
    """

    effective_bits: float | None = Field(default=None, gt=0)
    max_size_mb: float | None = Field(default=None, gt=0)
    max_bops: float | None = Field(default=None, gt=0)
    max_activation_mb: float | None = Field(default=None, gt=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_drop: float | None = Field(default=None, ge=0)
    drop_type: DropType | None = None

    def without(self, *limits: str) -> Constraints:
        """The others, in force by themselves: none of `limits`, and no accuracy to hold."""
        return self.replace(max_drop=None, drop_type=None, **dict.fromkeys(limits))

    def with_limit(self, limit: str, value: float) -> Constraints:
        """The same with one budget set, by its name."""
        return self.replace(**{limit: value})

    def budgets(self) -> dict[str, float]:
        """What can be computed from the widths alone: all but `max_drop`, where given."""
        given = self.model_dump(exclude={"max_drop", "drop_type"}, exclude_none=True)
        return {name: float(value) for name, value in given.items()}


class SearchResult(_Value):
    """What the search found. `bitops` is MACs x weight bits x activation bits, per image.

    `predicted_drop` is the sum of the scores (nats for the metrics that look at answers);
    `measured_drop` is in points of top-1 on validation images, where an accuracy was asked for.
    """

    effective_bits: float
    weight_bytes: int
    predicted_bytes: int
    bitops: float
    activation_bytes: int | None = None
    latency_ms: float | None = None
    predicted_drop: float | None = None
    measured_drop: float | None = None
    solver: str = ""
    status: str = ""
    gap: float = 0.0


class Policy(_Value):
    """A whole policy file: what every stage obeys.

    `outputs` are kinds by name (`mpq.outputs`), of a network that is more than a classifier.
    A file that names no target is for the computer that reads it; what mpq writes names one.
    """

    version: Literal[1] = 1
    model: ModelInfo | None = None
    data: DataInfo = DataInfo()
    outputs: dict[str, Annotated[OutputKind, BeforeValidator(_known_kind)]] = {}
    target: str = Field(default_factory=lambda: this_target().name)
    default: DefaultSpec = DefaultSpec()
    groups: tuple[tuple[str, ...], ...] = ()
    layers: tuple[LayerPolicy, ...] = ()
    constraints: Constraints = Constraints()
    result: SearchResult | None = None
    evidence: dict[str, Any] = {}

    @classmethod
    def uniform(cls, weight_bits: int, activation_bits: int | None = None) -> Policy:
        """Every layer at the same widths; activations default to 8 bits, for W16 to 16."""
        act = activation_bits or (16 if weight_bits == 16 else 8)
        default = DefaultSpec(weight=weight_spec(weight_bits), activation=activation_spec(act))
        return cls(default=default)

    def with_layers(self, *entries: LayerPolicy) -> Policy:
        """The policy with further entries, which win over those that it has."""
        return self.replace(layers=(*self.layers, *entries))

    def with_outputs(self, kinds: Mapping[str, OutputKind]) -> Policy:
        """The policy with the kinds of some outputs, which win over those that it has."""
        return self.replace(outputs={**self.outputs, **kinds}) if kinds else self

    def resolve(self, names: Sequence[str]) -> dict[str, LayerChoice]:
        """The decision for each layer of a network, in the order of `names`.

        Raises:
            PolicyError: as `choices`, or a format that the target has no layer for.
        """
        target = get_target(self.target)
        return {n: target.take(choice) for n, choice in self.choices(names).items()}

    def choices(self, names: Sequence[str]) -> dict[str, LayerChoice]:
        """What is asked for each layer, whatever the target makes of it.

        Raises:
            PolicyError: a pattern or group member that names no layer, or a group whose members
                differ in their activation format.
        """
        weights: dict[str, QuantSpec | Float] = dict.fromkeys(names, self.default.weight)
        acts: dict[str, QuantSpec | Float] = dict.fromkeys(names, self.default.activation)
        locked, reasons = dict.fromkeys(names, False), dict.fromkeys(names, "")
        for entry in self.layers:
            for name in _match(entry.name, names, "layers"):
                weights[name] = entry.weight or weights[name]
                acts[name] = entry.activation or acts[name]
                locked[name] = locked[name] if entry.locked is None else entry.locked
                reasons[name] = entry.reason or reasons[name]
        choices = {
            n: LayerChoice(n, _none_if_float(weights[n]), _none_if_float(acts[n]), locked[n], r)
            for n, r in reasons.items()
        }
        self._check_groups(choices)
        return choices

    def _check_groups(self, choices: dict[str, LayerChoice]) -> None:
        for group in self.groups:
            members = [n for pattern in group for n in _match(pattern, list(choices), "groups")]
            members = [n for n in members if not choices[n].dynamic]
            formats = {str(choices[n].activation or "float") for n in members}
            if len(formats) > 1:
                listed = ", ".join(f"{n}: {choices[n].activation or 'float'}" for n in members)
                raise PolicyError(
                    f"the layers of a group read one tensor, so their activation formats must "
                    f"agree. Got {listed}. Give them one format, or remove the group."
                )

    def to_yaml(self) -> str:
        """The text of the file: one line per layer, so that it can be read, edited and diffed."""
        data = self.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
        for key in ("outputs", "groups", "evidence", "result", "constraints"):
            if not data.get(key):
                data.pop(key, None)
        if data.get("model", {}).get("inputs"):
            del data["model"]["input"]  # nothing takes such images
        for layer in data["layers"]:
            if not layer["reason"]:
                del layer["reason"]
        return "".join(section(key, value) for key, value in data.items())

    def save(self, path: str | Path) -> Path:
        """Write a policy file, replacing what is there; `load` reads it."""
        write_text(Path(path), self.to_yaml())
        return Path(path)

    @classmethod
    def from_yaml(cls, text: str, where: str = "policy") -> Policy:
        """Read the text of a policy file; `where` names it in messages.

        Raises:
            PolicyError: text that is not YAML, an unknown key, a value of the wrong form.
        """
        data = mapping(text, where, PolicyError, "that begins with `version: 1`")
        if data.get("version") != 1:
            raise PolicyError(f"{where}: version must be 1. Got {data.get('version')!r} instead.")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise PolicyError(explain(error, where, _known_keys())) from None

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            PolicyError: the file is missing, unreadable or not a policy.
        """
        missing, remedy = f"policy {path} does not exist.", "`mpq analyze MODEL` writes one."
        return cls.from_yaml(read_named(path, PolicyError, missing, remedy), str(path))


def _none_if_float(spec: QuantSpec | Float) -> QuantSpec | None:
    return None if spec == "float" else spec


def _match(pattern: str, names: Sequence[str], where: str) -> list[str]:
    if pattern in names:
        return [pattern]
    found = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
    if not found:
        raise PolicyError(
            f"{where}: {pattern!r} must name a layer of the model (a module path or a glob) but "
            f"matches none of its {len(names)} layers{nearest(pattern, names)}"
        )
    return found


def _known_keys() -> Iterable[str]:
    models = (Policy, ModelInfo, DataInfo, DefaultSpec, LayerPolicy, Constraints, SearchResult)
    return sorted({name for m in models for name in m.model_fields})
