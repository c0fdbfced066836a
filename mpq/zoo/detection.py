"""Find the architecture of a checkpoint from the names and shapes of its tensors.

A candidate's names and shapes come from building it without memory for its weights. Of a
candidate only the head (its last weight, and the bias beside it) depends on the number of
classes, so the head's first dimension is free and says that number. All else must agree exactly,
apart from tensors that carry no learnt value.

This zoo is searched first, so that torchvision is imported only when needed. Of torchvision, a
family is built only if one tensor name that all its members have is in the checkpoint. What
weights cannot tell is the stride, the padding or the activation of a layer: a network that
differs from a known one only there is taken for the known one. `--model` is the way out.
"""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from mpq.errors import CheckpointError
from mpq.zoo.architectures import ARCHITECTURES, INPUT_SIZE
from mpq.zoo.builder import build, input_size, torchvision_names
from mpq.zoo.memoryless import WithoutMemory

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Value = TypeVar("Value")

# Counters, and the auxiliary classifiers that only training uses.
_UNUSED = re.compile(
    r"(.*\.)?(num_batches_tracked|total_ops|total_params)|(aux1|aux2|AuxLogits)\..*"
)
# Other public names for the same tensors, each set tried as a whole.
_SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc.")),
    ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")),
    ((r"(denselayer\d+)\.(norm|conv)\.([12])\.", r"\1.\2\3."),),
)
# Start of the names of a torchvision family, and a tensor that every member has. The longest
# matching start counts; names that match none are always tried.
_FAMILIES: dict[str, str] = {
    "alexnet": "features.10.weight",
    "convnext": "features.1.0.layer_scale",
    "densenet": "features.denseblock1.denselayer1.norm1.weight",
    "efficientnet": "features.1.0.block.0.0.weight",
    "googlenet": "inception3a.branch1.conv.weight",
    "inception": "Mixed_5b.branch1x1.conv.weight",
    "maxvit": "stem.1.0.weight",
    "mnasnet": "layers.8.0.layers.0.weight",
    "mobilenet_v2": "features.1.conv.0.0.weight",
    "mobilenet_v3": "features.1.block.0.0.weight",
    "regnet": "trunk_output.block1.block1-0.f.a.0.weight",
    "resnet": "layer4.0.conv1.weight",
    "resnext": "layer4.0.conv3.weight",
    "shufflenet": "stage2.0.branch1.0.weight",
    "squeezenet": "features.3.squeeze.weight",
    "swin": "features.1.0.attn.qkv.weight",
    "vgg": "classifier.6.weight",
    "vit": "encoder.layers.encoder_layer_0.ln_1.weight",
    "wide_resnet": "layer4.0.conv3.weight",
}


@dataclass(frozen=True, slots=True)
class Recognized:
    """A network with the weights of a checkpoint, in evaluation mode.

    `arch` is a name that `build` takes, or where a pickled module's class lies; `input` is
    `(C, H, W)`, `classes` the outputs of the last layer.
    """

    network: nn.Module
    arch: str
    classes: int
    input: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Template:
    """Names and shapes of a network's tensors; `head` is the name of its last weight."""

    shapes: dict[str, Shape]
    head: str

    def classes_of(self, shapes: Mapping[str, Shape]) -> int | None:
        """Number of classes if tensors of these shapes fit, else None."""
        if shapes.keys() != self.shapes.keys():
            return None
        classes = shapes[self.head][0] if shapes[self.head] else 0
        fits = all(shapes[k] == s for k, s in self.with_classes(classes).items())
        return classes if fits and classes > 0 else None

    def with_classes(self, classes: int) -> dict[str, Shape]:
        """The shapes for another number of classes."""
        bias = self.head.removesuffix("weight") + "bias"
        head = {k: (classes, *self.shapes[k][1:]) for k in (self.head, bias) if k in self.shapes}
        return {**self.shapes, **head}


def detect(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Architecture and number of classes of a state dict.

    Args:
        state: tensors by name; a common prefix such as `module.` may stand before all names.

    Raises:
        CheckpointError: nothing fits; the message names the nearest and what differs.
    """
    return _detect(strip(state))


def recognize(
    state: Mapping[str, Tensor],
    arch: str | None = None,
    *,
    classes: int | None = None,
    size: tuple[int, int, int] | None = None,
) -> Recognized:
    """Build the network that a state dict belongs to, and put its weights in.

    Args:
        state: tensors by name, as for `detect`.
        arch: name or `package.module:factory`; None: the architecture that the weights fit.
        classes: outputs to ask a factory for where the weights do not tell; 10 if None.
        size: `(C, H, W)` of its images; None: what the architecture is meant for.

    Raises:
        CheckpointError: nothing fits, or the weights are not those of `arch`.
        UsageError: an unknown architecture, a factory that fails.
    """
    plain = strip(state)
    arch, outputs = (arch, _outputs(plain, arch)) if arch else _detect(plain)
    size = size or input_size(arch)
    network = build(arch, outputs or classes or 10, in_channels=size[0])
    own = network.state_dict()
    network.load_state_dict({**own, **_under_own_names(plain, own, arch)})
    return Recognized(network, arch, _outputs(_counted(own), arch) or 1, size)


def recognize_module(module: nn.Module, arch: str | None = None) -> Recognized:
    """What a module that came whole is: its weights say so only if its class is a known one.

    Raises:
        CheckpointError: the module is of this zoo or of torchvision, and its weights fit nothing.
        UsageError: an unknown architecture, a factory that cannot be imported.
    """
    plain, kind = strip(module.state_dict()), type(module)
    if arch is None and kind.__module__.startswith(("mpq.zoo.", "torchvision.models.")):
        arch, _ = _detect(plain)
    own = f"{kind.__module__}:{kind.__qualname__}"
    if arch in (None, own):  # its code is here already: it came with the file
        arch, size = own, getattr(kind, "input_size", (3, *INPUT_SIZE))
    else:
        size = input_size(arch)
    return Recognized(module.float().eval(), arch, _outputs(plain, arch) or 1, size)


def _detect(plain: dict[str, Tensor]) -> tuple[str, int]:
    """Architecture and classes of a state dict without prefix."""
    for spelling in _SPELLINGS:
        renamed = _rename(plain, spelling)
        if spelling and renamed.keys() == plain.keys():
            continue
        shapes = _shapes(renamed)
        fits = _fitting(shapes, ARCHITECTURES) or _fitting(shapes, _torchvision_candidates(shapes))
        if fits:
            _log(fits, renamed=bool(spelling))
            return fits[0]
    raise CheckpointError(_no_match(_shapes(plain)))


def _under_own_names(
    plain: dict[str, Tensor], own: Mapping[str, Tensor], arch: str
) -> dict[str, Tensor]:
    """The state under the names that the network has for it, ready for `load_state_dict`."""
    names = short_names(own)
    wanted = {short: tuple(own[name].shape) for short, name in names.items()}
    for spelling in _SPELLINGS:
        renamed = _rename(plain, spelling)
        if _shapes(renamed) == wanted:
            found = {names[name]: tensor for name, tensor in renamed.items()}
            _check_types(found, own)
            return found
    raise CheckpointError(
        f"the weights must be those of {arch}, but differ: {differences(_shapes(plain), wanted)}. "
        f"Leave --model away to have the network found, or give the function that builds it with "
        f"--model package.module:factory."
    )


def _check_types(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights that would be turned into others without a word, such as integers or bools."""
    for name, tensor in found.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            kind = "floats" if own[name].is_floating_point() else str(own[name].dtype)
            raise CheckpointError(
                f"{name} must be {kind}, but is {tensor.dtype}. mpq starts from the float network."
            )


def _outputs(plain: dict[str, Tensor], arch: str) -> int | None:
    """Outputs of the head of a named architecture; else of the last weight. None without such."""
    if ":" in arch:
        weights = [t for k, t in plain.items() if k.endswith("weight") and t.ndim in (2, 4)]
        return int(weights[-1].shape[0]) if weights else None
    for spelling in _SPELLINGS:
        head = _rename(plain, spelling).get(template(arch).head)
        if head is not None and head.ndim:
            return int(head.shape[0])
    return None


def strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop a prefix that all names share, counters and auxiliary classifiers.

    DataParallel writes `module.` before all names, torch.compile `_orig_mod.`, training
    frameworks `model.` or `net.`; a network on its own has several parts at the top.
    """
    return {short: state[name] for short, name in short_names(state).items()}


def short_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Short to full names, of the tensors that count."""
    short = {name: name for name in state}
    while len({s.partition(".")[0] for s in short}) == 1 and all("." in s for s in short):
        short = {s.partition(".")[2]: name for s, name in short.items()}
    return _counted(short)


def _counted(items: Mapping[str, Value]) -> dict[str, Value]:
    """Without counters and auxiliary classifiers; names have no prefix."""
    return {name: value for name, value in items.items() if not _UNUSED.fullmatch(name)}


def differences(have: Mapping[str, Shape], want: Mapping[str, Shape], *, limit: int = 3) -> str:
    """What a checkpoint lacks, has too much or in another shape, in words."""
    parts = []
    for word, keys in (
        ("missing", [k for k in want if k not in have]),
        ("not expected", [k for k in have if k not in want]),
    ):
        if keys:
            parts.append(f"{len(keys)} {word} ({_few(keys, limit)})")
    other = [k for k in want if k in have and have[k] != want[k]]
    if other:
        listed = [f"{k} is {list(have[k])}, must be {list(want[k])}" for k in other]
        parts.append(f"{len(other)} of another shape ({_few(listed, limit)})")
    return "; ".join(parts) or "nothing"


@functools.cache
def template(arch: str) -> Template:
    """Names and shapes of an architecture by name; its weights are never allocated."""
    with WithoutMemory():
        shapes = _shapes(_counted(build(arch, 10).state_dict()))
    head = [k for k, s in shapes.items() if k.endswith("weight") and len(s) >= 2][-1]
    return Template(shapes, head)


def _fitting(shapes: Mapping[str, Shape], archs: Iterable[str]) -> list[tuple[str, int]]:
    counts = ((arch, template(arch).classes_of(shapes)) for arch in archs)
    return [(arch, classes) for arch, classes in counts if classes]


def _torchvision_candidates(shapes: Mapping[str, Shape]) -> list[str]:
    return [n for n in torchvision_names() if (key := family_key(n)) is None or key in shapes]


def family_key(arch: str) -> str | None:
    """The tensor that every network of a torchvision family has; None for an unknown family."""
    starts = [start for start in _FAMILIES if arch.startswith(start)]
    return _FAMILIES[max(starts, key=len)] if starts else None


def _log(fits: list[tuple[str, int]], *, renamed: bool) -> None:
    arch, classes = fits[0]
    names = " after renaming its tensors" if renamed else ""
    logger.info("the checkpoint fits %s with %d classes%s", arch, classes, names)
    if len(fits) > 1:
        others = ", ".join(name for name, _ in fits[1:])
        logger.warning("the checkpoint fits %s, taken, but also %s; --model decides", arch, others)


def _no_match(shapes: Mapping[str, Shape]) -> str:
    """Compare with everything that is cheap or has a tensor in common with the checkpoint."""
    archs = dict.fromkeys([*ARCHITECTURES, *_torchvision_candidates(shapes)])
    ranked = sorted(archs, key=lambda a: _likeness(shapes, template(a).shapes), reverse=True)
    near = []
    for arch in ranked[:2]:
        known = template(arch)
        have_head = shapes.get(known.head) or (10,)
        near.append(f"{arch}: {differences(shapes, known.with_classes(have_head[0]))}")
    return (
        f"the checkpoint's {len(shapes)} tensors must be those of a known architecture, but fit "
        f"none. Nearest: {'. '.join(near)}. Name the network with --model NAME, or give the "
        f"function that builds it with --model package.module:factory."
    )


def _likeness(have: Mapping[str, Shape], want: Mapping[str, Shape]) -> float:
    """0 to 2: overlap of the named shapes, plus overlap of the shapes without names."""
    named = len(have.items() & want.items()) / max(1, len(have.keys() | want.keys()))
    a, b = Counter(have.values()), Counter(want.values())
    return named + (a & b).total() / max(1, (a | b).total())


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _rename(state: dict[str, Tensor], rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    names = {name: name for name in state}
    for pattern, new in rules:
        names = {old: re.sub(pattern, new, name) for old, name in names.items()}
    return {names[old]: tensor for old, tensor in state.items()}


def _few(items: list[str], limit: int) -> str:
    more = f", and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
