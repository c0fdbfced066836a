"""`Sensitivity`: what quantizing each layer would cost, as a value that is kept and solved again.

Rows say what one part of one layer at one width adds to the loss. With the layers and their groups
beside them, any budget can be solved later without a model, an image, or torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from mpq.errors import PolicyError
from mpq.layers import FloatPart, LayerInfo, LiveSet

Part = Literal["weight", "activation"]
PARTS: tuple[Part, ...] = ("weight", "activation")
FORMAT = "mpq/sensitivity"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Args:
        layer: module path.
        part: `weight`, or `activation` for the tensor that the layer reads.
        bits: width that was tried.
        score: predicted increase of the loss, finite and >= 0; for `fisher` and `kl` in nats.
        sqnr: signal-to-quantization-noise ratio of the tensor in dB; None where there is no noise
            or nothing was seen.
    """

    layer: str
    part: Part
    bits: int
    score: float
    sqnr: float | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}. Got {self.part!r} instead.")
        if not math.isfinite(self.score) or self.score < 0:
            raise ValueError(
                f"the score of {self.layer} ({self.part}, {self.bits} bits) must be finite and "
                f">= 0. Got {self.score} instead."
            )


@dataclass(frozen=True)
class Sensitivity:
    """The scores of a network.

    Args:
        rows: measurements, in execution order of the layers.
        layers: every layer of the network, in execution order.
        groups: names of layers that read one tensor and must agree on its format.
        metric: how the rows were scored.
        samples: number of images looked at.
        seed: of the random draws.
        key: hash of weights, images and settings; equal keys mean equal rows.
        live_sets: activations that are alive at one time, for the budget of activation memory.
        besides: what the network stores and computes besides its layers.
    """

    rows: tuple[Row, ...]
    layers: tuple[LayerInfo, ...]
    groups: tuple[tuple[str, ...], ...]
    metric: str
    samples: int
    seed: int
    key: str
    live_sets: tuple[LiveSet, ...] = ()
    besides: tuple[FloatPart, ...] = ()

    def __post_init__(self) -> None:
        names = {layer.name for layer in self.layers}
        strange = {r.layer for r in self.rows} | {n for group in self.groups for n in group}
        if strange - names:
            raise ValueError(
                f"rows and groups must name layers of the network. Got {sorted(strange - names)}."
            )

    @cached_property
    def _scores(self) -> dict[tuple[str, str, int], float]:
        return {(r.layer, r.part, r.bits): r.score for r in self.rows}

    def bits(self, part: Part) -> list[int]:
        """Widths that were scored, widest first."""
        return sorted({r.bits for r in self.rows if r.part == part}, reverse=True)

    def score(self, layer: str, part: Part, bits: int | None) -> float:
        """Predicted loss increase of one part of a layer; 0 for float (None).

        Raises:
            PolicyError: that width was not scored.
        """
        if bits is None:
            return 0.0
        try:
            return self._scores[layer, part, bits]
        except KeyError:
            raise PolicyError(
                f"{part} of layer {layer} must have a score at {bits} bits, but was scored at "
                f"{self.bits(part)} only. Analyze again with {bits} among the widths."
            ) from None

    def predict(self, widths: Mapping[str, tuple[int | None, int | None]]) -> float:
        """Predicted loss increase of a whole configuration: the sum over layers and parts."""
        return math.fsum(
            self.score(name, part, bits)
            for name, pair in widths.items()
            for part, bits in zip(PARTS, pair, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `sensitivity.json`, without `front` and `chosen`."""
        return {
            "format": FORMAT,
            "version": 1,
            "metric": self.metric,
            "samples": self.samples,
            "seed": self.seed,
            "key": self.key,
            "layers": [{**dataclasses.asdict(one), "params": one.params} for one in self.layers],
            "groups": [list(group) for group in self.groups],
            "moments": [{"fixed": m.fixed, "layers": dict(m.layers)} for m in self.live_sets],
            "besides": [dataclasses.asdict(part) for part in self.besides],
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str, where: str = "sensitivity") -> Sensitivity:
        """Read what `to_json` wrote (a mapping or its text); other keys are left alone.

        Raises:
            PolicyError: the content is not that of a sensitivity file.
        """
        try:
            content = json.loads(data) if isinstance(data, str) else data
            if (content["format"], content["version"]) != (FORMAT, 1):
                raise ValueError(f"format {content['format']!r} version {content['version']!r}")
            return cls(
                rows=tuple(Row(**row) for row in content["rows"]),
                layers=tuple(_layer(layer) for layer in content["layers"]),
                groups=tuple(tuple(group) for group in content["groups"]),
                live_sets=tuple(
                    LiveSet(m["fixed"], tuple(m["layers"].items()))
                    for m in content.get("moments", ())
                ),
                besides=tuple(FloatPart(**part) for part in content.get("besides", ())),
                **{k: content[k] for k in ("metric", "samples", "seed", "key")},
            )
        except (ValueError, TypeError, KeyError) as error:
            raise PolicyError(
                f"{where} must hold what `mpq analyze` writes (format {FORMAT}, version 1). "
                f"It cannot be read: {error}. Analyze again to replace it."
            ) from None


def by_name(layers: Iterable[LayerInfo]) -> dict[str, LayerInfo]:
    """Layers by module path."""
    return {layer.name: layer for layer in layers}


def _layer(data: Mapping[str, Any]) -> LayerInfo:
    older = {
        "grouped",
        "strided",
        "dilated",
        "constant",
    } - data.keys()  # than these facts of a layer
    fields = {f.name: data[f.name] for f in dataclasses.fields(LayerInfo) if f.name not in older}
    return LayerInfo(**{**fields, "weight_shape": tuple(fields["weight_shape"])})
