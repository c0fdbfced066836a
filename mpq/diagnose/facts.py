"""`Facts`: what the files of a run say, as the rules of diagnosis read it.

No torch here, except to read what a training says of itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mpq import limits, origins, rundir
from mpq.errors import CheckpointError, UsageError
from mpq.layers import Widths
from mpq.policy import Policy

Json = Mapping[str, Any]
READ = {
    "sensitivity.json": "mpq analyze MODEL.pth",
    "tensors.json": "mpq diagnose",
    "validation.json": "mpq analyze MODEL.pth --validate 50",
    "profile.json": "mpq profile MODEL.pth",
    "certificate.json": "mpq export",
    "bench.jsonl": "mpq bench",
}
"""What is asked, and the command that writes it."""
NATS = ("fisher", "gradient", "kl", "loss")
"""Metrics whose scores are a divergence, or an increase of the loss, in nats."""


@dataclass(frozen=True)
class Facts:
    """What is known of a run; None, or nothing, where it is not.

    Args:
        policy: what was asked.
        sensitivity: content of `sensitivity.json`, as the following of theirs.
        tensors: of `tensors.json`.
        validation: of `validation.json`.
        profile: of `profile.json`.
        certificate: of `certificate.json`.
        bench: the lines of `bench.jsonl`.
        trained: metrics of `qat.pth`, where the file of the run is made from it.
        looked_at: names of the files that were read.
    """

    policy: Policy | None = None
    sensitivity: Json | None = None
    tensors: Json | None = None
    validation: Json | None = None
    profile: Json | None = None
    certificate: Json | None = None
    bench: Sequence[Json] = ()
    trained: Json | None = None
    looked_at: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, folder: Path) -> Facts:
        """Read a run; what is stale there counts as missing.

        Raises:
            UsageError: a file is not JSON.
            PolicyError: `policy.yaml` is none.
        """
        found: dict[str, Any] = {}
        for name in READ:
            content = _content(folder / name)
            if content is not None:
                found[name.partition(".")[0]] = content
        looked = tuple(name for name in READ if name.partition(".")[0] in found)
        policy = folder / "policy.yaml"
        if policy.is_file():
            found["policy"], looked = Policy.load(policy), ("policy.yaml", *looked)
        return cls(**found, trained=_trained(folder), looked_at=looked)

    @property
    def missing(self) -> dict[str, str]:
        """The files that were not there, and the commands that write them."""
        return {name: command for name, command in READ.items() if name not in self.looked_at}

    @cached_property
    def layers(self) -> dict[str, Json]:
        """What was scored, by name."""
        return (
            {} if self.sensitivity is None else {x["name"]: x for x in self.sensitivity["layers"]}
        )

    @cached_property
    def widths(self) -> dict[str, Widths]:
        """Weight and activation bits of each layer, as the policy has them."""
        if self.policy is not None:
            chosen = self.policy.choices(list(self.layers))
            return {n: (c.weight_bits, c.activation_bits) for n, c in chosen.items()}
        pairs = (self.sensitivity or {}).get("chosen") or {}
        return {name: (pair[0], pair[1]) for name, pair in pairs.items()}

    @cached_property
    def scores(self) -> dict[tuple[str, str, int], float]:
        """By layer, part and bits."""
        rows = () if self.sensitivity is None else self.sensitivity["rows"]
        return {(row["layer"], row["part"], row["bits"]): row["score"] for row in rows}

    def score(self, layer: str, part: str, bits: int | None) -> float:
        """What was predicted of one part of a layer; 0 where it is float or was not scored."""
        return 0.0 if bits is None else self.scores.get((layer, part, bits), 0.0)

    def cost(self, layer: str) -> float:
        """What was predicted of both parts of a layer at its widths."""
        weight, activation = self.widths.get(layer, (None, None))
        return self.score(layer, "weight", weight) + self.score(layer, "activation", activation)

    @cached_property
    def total(self) -> float:
        """What was predicted of the whole policy."""
        return sum(self.cost(name) for name in self.layers)

    @property
    def unit(self) -> str:
        """Of scores and their sums."""
        return score_unit("" if self.sensitivity is None else self.sensitivity["metric"])

    @property
    def in_nats(self) -> bool:
        """Whether scores are of the kind that has a size one can judge."""
        return self.unit == "nats"

    def row(self, name: str) -> Json | None:
        """What was measured of a file of the run."""
        return next((row for row in self.bench if Path(row["file"]).name == name), None)


def score_unit(metric: str) -> str:
    """What the scores of a metric, and the drops that they predict, are counted in."""
    if metric in NATS:
        return "nats"
    return "noise over signal" if metric == "sqnr" else f"units of {metric}"


def _content(path: Path) -> Any:
    """A file of a run, of `.jsonl` its lines; None where it is not there, or of something else."""
    noted = path.name != "profile.json"  # which is of a CPU, and of no other file
    if not path.is_file() or (noted and origins.doubt(path)):
        return None
    if path.name == "bench.jsonl" and not origins.is_of(path, "model.onnx"):
        return None
    return limits.read_json(path, UsageError, READ[path.name])


def _trained(folder: Path) -> Json | None:
    """The metrics of `qat.pth`, where the run's file is made from it, or will be."""
    model, trained = folder / "model.onnx", folder / rundir.STAGES["qat"]
    name = origins.made_of(model, rundir.QUANTIZED) if model.is_file() else None
    newest = folder / name if name else origins.newest(folder, rundir.QUANTIZED)
    if newest != trained or not trained.is_file() or origins.doubt(trained):
        return None
    from mpq._torchfile import load_safe  # torch: seconds of import, for trained runs alone

    try:
        content = load_safe(trained)
    except CheckpointError:  # as what is stale; whoever takes it says what is wrong with it
        return None
    metrics = content.get("metrics") if isinstance(content, dict) else None
    return metrics if isinstance(metrics, dict) else None
