"""`LatencyProfile`: what each layer costs in milliseconds on one CPU, measured. Free of torch.

The latency of a configuration is `base + sum of layers + sum of boundaries`. A layer has two costs
only, as integers and in float, because that is all the runtime has: whatever widths its integer
kernel takes run in that one, all others in float; `mpq.target` knows which. A
boundary is paid on an edge between two layers one of which runs as integers and the other in float:
there the tensor is converted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpq.errors import PolicyError, UsageError, nearest
from mpq.files import write_text
from mpq.limits import read_named

VERSION = 1
Edge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LayerLatency:
    """Milliseconds of one layer with what belongs to it (its ReLU, the addition after it).

    Args:
        integer_ms: as an 8-bit kernel; a layer that reads the network's input or writes its output
            pays for that conversion here.
        float_ms: as the float kernel that 16-bit and float layers share.
    """

    integer_ms: float
    float_ms: float


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """Measured costs of one network on one machine.

    Args:
        cpu: identity of the CPU that was measured.
        runtime: name and version of the runtime, e.g. `onnxruntime 1.31.1`.
        threads: threads inside an operation.
        batch: images at a time; all times are for one batch.
        layers: cost of each layer by module path.
        boundary_ms: cost of the conversions on the edge between two layers, (from, to), when one of
            them runs as integers and the other in float.
        base_ms: all else: what is paid whatever the widths are.
        target: name of the target that was measured, where it was not the computer at hand.
    """

    cpu: str
    runtime: str
    threads: int
    batch: int
    layers: dict[str, LayerLatency]
    boundary_ms: dict[Edge, float]
    base_ms: float
    target: str = ""

    def __post_init__(self) -> None:
        """Refuse edges to nowhere and numbers that are no times.

        Raises:
            UsageError: either of these.
        """
        for edge in self.boundary_ms:
            for end in edge:
                if end not in self.layers:
                    raise UsageError(
                        f"boundary {edge[0]} -> {edge[1]} of a latency profile must lie between "
                        f"two of its layers. {end!r} is none{nearest(end, self.layers) or '.'}"
                    )
        times = [self.base_ms, *self.boundary_ms.values()]
        times += [t for cost in self.layers.values() for t in (cost.integer_ms, cost.float_ms)]
        wrong = next((t for t in times if not (math.isfinite(t) and t >= 0)), None)
        if wrong is not None:
            raise UsageError(
                f"times of a latency profile must be finite milliseconds, 0 or more. Got {wrong}."
            )

    def predict(self, integer: Mapping[str, bool]) -> float:
        """Milliseconds of a configuration.

        Args:
            integer: whether each layer runs as integers (`mpq.target.Target.integers`).

        Raises:
            PolicyError: a layer of the profile has no width, or one that it does not have has.
        """
        self.check(integer)
        layers = sum(
            cost.integer_ms if integer[name] else cost.float_ms
            for name, cost in self.layers.items()
        )
        edges = sum(ms for (a, b), ms in self.boundary_ms.items() if integer[a] != integer[b])
        return self.base_ms + layers + edges

    def check(self, names: Mapping[str, object]) -> None:
        """See that the profile is one of a network with layers of these names.

        Raises:
            PolicyError: it is of another network.
        """
        for have, lack, what in (
            (self.layers, names, "the network lacks"),
            (names, self.layers, "the profile lacks"),
        ):
            missing = next((name for name in have if name not in lack), None)
            if missing is not None:
                raise PolicyError(
                    f"the latency profile must be of the same network, but {what} layer "
                    f"{missing!r}{nearest(missing, lack) or '.'} Measure it with `mpq profile`."
                )

    def to_json(self) -> str:
        """The contents of `profile.json`."""
        data = asdict(self)
        data["boundary_ms"] = [[a, b, ms] for (a, b), ms in self.boundary_ms.items()]
        if not self.target:
            del data["target"]
        return json.dumps({"version": VERSION, **data}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "the latency profile") -> LatencyProfile:
        """Read what `to_json` wrote; `where` names it in messages.

        Raises:
            UsageError: it is not such a text, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise UsageError(
                    f"{where}: version must be {VERSION}. Got {data['version']!r} instead; "
                    "measure again with `mpq profile --force`."
                )
            return cls(
                cpu=str(data["cpu"]),
                runtime=str(data["runtime"]),
                threads=int(data["threads"]),
                batch=int(data["batch"]),
                layers={name: _layer(cost) for name, cost in data["layers"].items()},
                boundary_ms={(str(a), str(b)): float(ms) for a, b, ms in data["boundary_ms"]},
                base_ms=float(data["base_ms"]),
                target=str(data.get("target", "")),
            )
        except UsageError as error:
            message = str(error)
            raise UsageError(message if where in message else f"{where}: {message}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{where} must be a profile that `mpq profile` wrote. Cannot read it: "
                f"{type(error).__name__}: {error}"
            ) from None

    def save(self, path: Path) -> None:
        """Write `profile.json`, whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> LatencyProfile:
        """Read `profile.json`.

        Raises:
            UsageError: there is no such file, or it is something else.
        """
        missing = f"latency profile {path} does not exist."
        remedy = "`mpq profile MODEL` writes one."
        return cls.from_json(read_named(path, UsageError, missing, remedy), str(path))


def _layer(cost: dict[str, Any]) -> LayerLatency:
    return LayerLatency(float(cost["integer_ms"]), float(cost["float_ms"]))
