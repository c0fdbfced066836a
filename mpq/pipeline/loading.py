"""The network that a policy names: found again, and checked to be the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from mpq import zoo
from mpq.capture.network import Network
from mpq.checkpoint import Loaded, Reading, open_model
from mpq.errors import CheckpointError, PolicyError
from mpq.policy import ModelInfo, Policy
from mpq.trusted import is_name
from mpq.zoo.whole import is_whole


def find_checkpoint(info: ModelInfo, policy_path: Path) -> Path:
    """Where a policy's checkpoint lies: seen from here, from the policy, or from above it.

    Raises:
        PolicyError: the policy names none.
        CheckpointError: it is in none of these places.
    """
    if not info.checkpoint:
        raise PolicyError(f"{policy_path} must name its checkpoint (key `model.checkpoint`).")
    # A policy in runs/NAME names its checkpoint as seen from the folder above runs.
    places = [Path(), *policy_path.absolute().parents]
    found = next((p / info.checkpoint for p in places if (p / info.checkpoint).exists()), None)
    if found is None:
        raise CheckpointError(
            f"the checkpoint {info.checkpoint} that {policy_path} was made for does not exist "
            f"(looked in the working directory, {policy_path.parent} and above). Put it there, or "
            "edit model.checkpoint."
        )
    return found


def reading_of(policy: Policy, where: Path, asked: Reading) -> tuple[Path, Reading]:
    """The file of a policy's network as it is now, and how it is read: as asked, else as it was.

    Raises:
        PolicyError: the policy names no network.
        CheckpointError: it is not there.
    """
    info = named(policy, where)
    if not info.checkpoint and is_name(info.arch):
        return Path(info.arch), replace(asked, input=asked.input or info.inputs or info.input)
    return find_checkpoint(info, where), replace(
        asked,
        arch=asked.arch or info.arch,
        weights=asked.weights or info.weights,
        input=asked.input or info.inputs or info.input,
    )


def named(policy: Policy, where: Path) -> ModelInfo:
    """The network that a policy names.

    Raises:
        PolicyError: it names none.
    """
    if policy.model is None:
        raise PolicyError(
            f"{where} must name the model that it is for (key `model`). `mpq analyze` writes it."
        )
    return policy.model


def load_weights(info: ModelInfo, policy_path: Path, trust_pickle: bool) -> Loaded:
    """The network of a policy with its weights, as they were when the policy was made.

    Raises:
        PolicyError: the policy names no checkpoint, or was made for other weights.
        CheckpointError: it is missing or unreadable.
    """
    brought = not info.checkpoint and is_name(info.arch)
    found = Path(info.arch) if brought else find_checkpoint(info, policy_path)
    arch = None if brought else info.arch
    reading = Reading(arch, info.classes, info.weights, info.inputs or info.input, trust_pickle)
    loaded = open_model(found, reading)
    digest = loaded.info.sha256
    if info.sha256 and digest != info.sha256:
        raise PolicyError(
            f"{policy_path} was made for other weights than those in {found}: sha256 must be "
            f"{info.sha256[:12]}..., got {digest[:12]}.... Run `mpq analyze {found}` again, or "
            "remove model.sha256 from the policy to use it all the same."
        )
    return loaded


def load_architecture(info: ModelInfo, policy_path: Path, trust_pickle: bool) -> Loaded:
    """The network that a policy was made for; its weights are of no account."""
    if info.checkpoint:
        try:
            found = find_checkpoint(info, policy_path)
        except CheckpointError:
            found = None  # what has a name can be built without it
        if found and (is_whole(found) or trust_pickle):
            takes = info.inputs or info.input
            return open_model(found, Reading(info.arch, None, info.weights, takes, trust_pickle))
    module = zoo.build(info.arch, info.classes, in_channels=info.input[0])
    return Loaded(module, info, call=example_call(module, info))


def example_call(module: nn.Module, info: ModelInfo) -> Network | None:
    """An example call of a network that takes more than images."""
    return Network.of_specs(module, info.inputs) if info.inputs else None
