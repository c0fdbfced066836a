"""Ready-made policies: `load("w4a8")` is uniform and fits any network.

Uniform ones name no target: they are for the computer that reads them.
`resnet20-cifar10-4.8bit.yaml` is what `mpq analyze` found for a ResNet-20; it names the hash of the
weights that it was made for. Those with what was seen at their head are the study's, of its
checkpoints in `benchmarks/results` and for CPUs with VNNI.
"""

from __future__ import annotations

from pathlib import Path

from mpq.errors import PolicyError, nearest
from mpq.policy import Policy

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the ready-made policies."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load(name: str) -> Policy:
    """A ready-made policy by name.

    Raises:
        PolicyError: an unknown name.
    """
    if name not in names():
        raise PolicyError(
            f"a ready-made policy must be one of {', '.join(names())}. "
            f"Got {name!r}{nearest(name, names())}"
        )
    return Policy.load(_FOLDER / f"{name}.yaml")
