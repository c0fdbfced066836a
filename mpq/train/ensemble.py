"""Teachers as one module and one file.

`ens.pth` holds for each member its architecture, normalization, weights and measured accuracy, and
the accuracy of all together. A file with a single model is read as an ensemble of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.checkpoint import Loaded, Reading, load_safe, loaded_from, open_model
from mpq.data import Normalization
from mpq.errors import CheckpointError, MpqError
from mpq.policy import ModelInfo
from mpq.saved import Kind
from mpq.train.evaluate import (
    Images,
    Labels,
    class_logits,
    normalize_unit,
    predict_units,
    top1,
)
from mpq.trusted import is_name
from mpq.zoo import build
from mpq.zoo.whole import is_whole

KIND = Kind("mpq/ensemble", 1, "be an ensemble that mpq wrote.")


@dataclass(frozen=True)
class Member:
    """One teacher.

    Args:
        name: how reports and metrics call it.
        module: takes normalized images `[B, 3, H, W]`, gives logits `[B, C]`.
        normalize: its own normalization.
        top1: measured accuracy in percent, None if never measured.
        arch: zoo or torchvision name or `module:factory`; needed only for saving.
        classes: number of logits; needed only for saving.
        input: `(channels, height, width)`; images of another size are resized for it.
        source: its file or folder, where that alone can build it: it must still be there when the
            ensemble is read.
    """

    name: str
    module: nn.Module
    normalize: Normalization
    top1: float | None = None
    arch: str = ""
    classes: int = 0
    input: tuple[int, int, int] | None = None
    source: str = ""


class Ensemble(nn.Module):
    """Frozen teachers: images `[B, 3, H, W]` in 0..1 to logits `[K, B, C]`, always in eval mode.

    Args:
        members: at least one; all must give the same number of logits.
        top1: measured accuracy in percent of the mean of the members' probabilities.

    Raises:
        CheckpointError: no members, or members with different numbers of classes.
    """

    def __init__(self, members: Sequence[Member], *, top1: float | None = None) -> None:
        super().__init__()
        if not members:
            raise CheckpointError("an ensemble must have at least one member. Got none.")
        counts = {m.name: m.classes for m in members if m.classes}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
            raise CheckpointError(
                f"the members of an ensemble must have the same classes. Got {listed}."
            )
        self.members = tuple(members)
        self.top1 = top1
        self.networks = nn.ModuleList(m.module for m in members)
        self.requires_grad_(False)
        self.eval()

    @property
    def names(self) -> list[str]:
        """The members' names, in the order of the logits."""
        return [m.name for m in self.members]

    def train(self, mode: bool = True) -> Ensemble:
        """Stay in eval mode: a teacher's statistics must not move."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every member; each gets the images normalized its own way."""
        return torch.stack([self.answer(k, images) for k in range(len(self.members))])

    def answer(self, index: int, images: Tensor) -> Tensor:
        """Logits `[B, C]` of one member."""
        member = self.members[index]
        if member.input and images.shape[2:] != member.input[1:]:
            size = list(member.input[1:])
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return class_logits(member.module(normalize_unit(images, member.normalize)))


def measure(ensemble: Ensemble, images: Images, labels: Labels, *, batch: int = 250) -> Ensemble:
    """A copy whose members and whole carry their measured top-1 on these images.

    The members' modules are shared. Raises `DataError` for images or labels of another form.
    """
    logits = predict_units(ensemble, ensemble, images, batch)
    members = [
        replace(m, top1=top1(z, labels)) for m, z in zip(ensemble.members, logits, strict=True)
    ]
    return Ensemble(members, top1=top1(logits.softmax(2).mean(0), labels))


def save_ensemble(path: Path, ensemble: Ensemble, *, data: str = "") -> None:
    """Write all members into one file, atomically; `data` names what top-1 was measured on.

    Raises:
        CheckpointError: a member without an architecture name, or a path that cannot be written.
    """
    for m in ensemble.members:
        if not m.arch or not m.classes or not m.input:
            raise CheckpointError(
                f"member {m.name} must have arch, classes and input to be saved. Got "
                f"arch={m.arch!r}, classes={m.classes}, input={m.input}."
            )
    members = [
        {
            "name": m.name,
            "arch": m.arch,
            "classes": m.classes,
            "input": list(m.input or ()),
            "normalize": str(m.normalize),
            "top1": m.top1,
            "state": {k: v.detach().cpu() for k, v in m.module.state_dict().items()},
            **({"source": m.source} if m.source else {}),
        }
        for m in ensemble.members
    ]
    KIND.save(path, {"data": data, "top1": ensemble.top1, "members": members})


def load_ensemble(path: Path, *, normalize: str = "", how: Reading | None = None) -> Ensemble:
    """Read an ensemble, or a single model as an ensemble of one.

    Args:
        path: `ens.pth`, or anything that `mpq.checkpoint.load_model` reads.
        normalize: for a single model: its normalization, if the file does not carry it.
        how: for a single model: its architecture, and what of the file is taken.

    Raises:
        CheckpointError: a missing, damaged or foreign file; the message names the member.
    """
    found = read_teacher(path, how or Reading())
    return found[0] if isinstance(found, tuple) else _single(path, found, normalize)


def read_teacher(path: Path, how: Reading) -> tuple[Ensemble, str] | Loaded:
    """An `ens.pth` and the data it was measured on, or any other network.

    Args:
        path: a file or folder, or `package.module:factory`.
        how: any other network is read.

    Raises as `load_ensemble`.
    """
    if is_whole(path) or (is_name(str(path)) and not path.exists()):
        return open_model(path, how)
    content = load_safe(path, trust_pickle=how.trust_pickle)
    if not KIND.marks(content):
        return loaded_from(content, path, how)
    return _bundle(path, content), str(content.get("data", ""))


def _bundle(path: Path, content: dict[str, Any]) -> Ensemble:
    entries = KIND.checked(content, path).get("members")
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{path}: members must be a list with at least one entry.")
    members = [_member(entry, path, f"{path}: member {i}") for i, entry in enumerate(entries)]
    return Ensemble(members, top1=content.get("top1"))


def _single(path: Path, loaded: Loaded, normalize: str) -> Ensemble:
    info = loaded.info
    normalize = normalize or info.normalize
    if not normalize:
        raise CheckpointError(
            f"{path} does not say how its images are normalized. Give "
            "--teacher-normalize (normalize= in Python), e.g. imagenet."
        )
    norm, top1 = Normalization.parse(normalize), loaded.metrics.get("top1")
    member = member_of(path, loaded.module, info, normalize=norm, top1=top1)
    return Ensemble([member], top1=member.top1)


def member_of(
    path: Path,
    module: nn.Module,
    info: ModelInfo,
    *,
    normalize: Normalization,
    top1: float | None = None,
) -> Member:
    """The network of a checkpoint as a teacher, by the name of its file."""
    return Member(
        name=Path(path).stem,
        module=module,
        normalize=normalize,
        top1=top1,
        arch=info.arch,
        classes=info.classes,
        input=info.input,
        source=str(path) if is_whole(path) else "",
    )


def _built(entry: Any, path: Path) -> nn.Module:
    """The network of a member, by its name or from its own file."""
    classes, size = int(entry["classes"]), tuple(entry["input"])
    if not entry.get("source"):
        return build(entry["arch"], classes, in_channels=size[0])
    source = Path(entry["source"])
    near = path.parent / source.name
    return open_model(
        source if source.exists() else near, Reading(None, classes, input=size)
    ).module


def _member(entry: Any, path: Path, where: str) -> Member:
    try:
        module = _built(entry, path)
        module.load_state_dict(entry["state"])
        bad = [k for k, v in module.state_dict().items() if not bool(v.isfinite().all())]
        if bad:
            raise CheckpointError(f"{bad[0]} is not finite")
        channels, height, width = entry["input"]
        return Member(
            name=str(entry["name"]),
            module=module,
            normalize=Normalization.parse(entry["normalize"]),
            top1=entry.get("top1"),
            arch=entry["arch"],
            classes=int(entry["classes"]),
            input=(channels, height, width),
            source=str(entry.get("source", "")),
        )
    except (MpqError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())
        raise CheckpointError(f"{where} cannot be rebuilt: {reason[:500]}") from error
