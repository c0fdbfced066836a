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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from mpq.errors import CheckpointError
from mpq.zoo.architectures import ARCHITECTURES, INPUT_SIZE
from mpq.zoo.builder import assumed, build, input_size, shaped, stated_size
from mpq.zoo.fitting import Fitting, Recognized, outputs_of
from mpq.zoo.libraries import declared_input, timm_config, torchvision_names
from mpq.zoo.memoryless import WithoutMemory
from mpq.zoo.parts import Part, choose, levels, told
from mpq.zoo.spelling import Shape, counts, differences, shapes_of, spellings, strip

logger = logging.getLogger(__name__)
NAME_IT = (
    "Name the network with --model NAME, or give the function that builds it with --model "
    "package.module:factory."
)
Fits = list[tuple[str, int]]
Candidates = Callable[[Mapping[str, Shape]], Iterable[str]]

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

    A prefix such as `module.` may stand before all names.

    Raises:
        CheckpointError: nothing fits; the message names the nearest and what differs.
    """
    found, part = _detect([Part("", state)], None)
    return found[part][0]


def recognize(
    parts: Sequence[Part] | Mapping[str, Tensor],
    arch: str | None = None,
    *,
    classes: int | None = None,
    size: tuple[int, ...] | None = None,
    weights: str | None = None,
) -> Recognized:
    """Build the network that weights belong to, and put them in.

    Args:
        parts: the states of a file (`mpq.zoo.parts.states`), or one state dict.
        arch: a name that `build` takes; None: the architecture that the weights fit.
        classes: outputs to ask a factory for where the weights do not tell; 10 if None.
        size: `(C, H, W)` or `(H, W)` of its images; None: what the architecture is meant for.
        weights: which of the parts, as `--weights`; None: the averaged ones where there are some.

    Raises:
        CheckpointError: nothing fits, the weights are not those of `arch`, or those of several
            networks fit.
        UsageError: an unknown architecture, a factory that fails.
    """
    parts = [Part("", parts)] if isinstance(parts, Mapping) else parts
    candidates = levels(parts, weights)
    known: dict[Part, Fits] = {}
    if arch is None:
        known, part = _detect(parts, weights)
        arch, candidates = known[part][0][0], iter([[part]])
    stated = stated_size(arch)
    channels = shaped(size, stated or (3, *INPUT_SIZE))[0]
    make = partial(build, arch, in_channels=channels)
    fitting = Fitting(arch, make, classes or 10, head_of(arch))
    tried: list[Part] = []
    for level in candidates:
        tried += level
        found = {part: fit for part in level if (fit := fitting.fit(part))}
        if found:
            part = choose(list(found))
            fit = found[part]
            words = told(part, list(known or found))
            meant = stated or declared_input(fit.network) or assumed(arch, channels, size)
            return Recognized(fit.loaded(), arch, fit.classes, shaped(size, meant), words)
    raise CheckpointError(fitting.refusal(tried))


def recognize_module(
    module: nn.Module, arch: str | None = None, *, size: tuple[int, ...] | None = None
) -> Recognized:
    """What a module that came whole is: its weights say so only if its class is a known one.

    Raises:
        CheckpointError: the module is of this zoo or of torchvision, and its weights fit nothing.
        UsageError: an unknown architecture, a factory that cannot be imported.
    """
    state, kind = module.state_dict(), type(module)
    if arch is None and kind.__module__.startswith(("mpq.zoo.", "torchvision.models.")):
        arch, _ = detect(state)
    own = f"{kind.__module__}:{kind.__qualname__}"
    # Of another class the code is here already: it came with the file.
    meant = declared_input(module) if arch in (None, own) else input_size(str(arch))
    meant, arch = meant or assumed(own, _channels(module), size), arch or own
    classes = outputs_of(shapes_of(strip(state)), head_of(arch)) or 1
    return Recognized(module.float().eval(), arch, classes, shaped(size, meant))


def _detect(parts: Sequence[Part], weights: str | None) -> tuple[dict[Part, Fits], Part]:
    """The known architectures that parts fit, and the part to take.

    States are held against this zoo, then against torchvision; only then what lies inside of them.
    """
    zoo, torchvision = (lambda _: ARCHITECTURES), _torchvision_candidates
    orders: tuple[tuple[Candidates, ...], ...]
    for level, orders in zip(
        levels(parts, weights), (((zoo,), (torchvision,)), ((zoo, torchvision),)), strict=True
    ):
        for candidates in orders:
            found = {part: fits for part in level if (fits := _known(part, candidates))}
            if found:
                part = choose(list(found))
                _log(found[part])
                return found, part
    raise CheckpointError(_no_match(max((shapes_of(p.plain) for p in parts), key=len)))


def _known(part: Part, candidates: Iterable[Candidates]) -> Fits:
    """Names of known architectures that a part fits, each with its number of classes."""
    for state in spellings(part.plain):
        shapes = shapes_of(state)
        for names in candidates:
            counts = ((arch, template(arch).classes_of(shapes)) for arch in names(shapes))
            fits = [(arch, classes) for arch, classes in counts if classes]
            if fits:
                return fits
    return []


def head_of(arch: str) -> str | None:
    """The name of the last weight of an architecture, whose outputs are the classes, if known."""
    if arch.startswith("timm:"):
        classifier = timm_config(arch.removeprefix("timm:")).classifier
        first = classifier if isinstance(classifier, str) else (classifier or ("",))[0]
        return f"{first}.weight" if first else None
    return None if ":" in arch else template(arch).head


def _channels(module: nn.Module) -> int:
    """Channels of the image, as the first convolution has them."""
    convs = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    return next((conv.in_channels for conv in convs), 3)


@functools.cache
def template(arch: str) -> Template:
    """Names and shapes of an architecture by name; its weights are never allocated."""
    with WithoutMemory():
        shapes = shapes_of(build(arch, 10).state_dict())
    shapes = {name: shape for name, shape in shapes.items() if counts(name)}
    head = [k for k, s in shapes.items() if k.endswith("weight") and len(s) >= 2][-1]
    return Template(shapes, head)


def _torchvision_candidates(shapes: Mapping[str, Shape]) -> list[str]:
    return [n for n in torchvision_names() if (key := family_key(n)) is None or key in shapes]


def family_key(arch: str) -> str | None:
    """The tensor that every network of a torchvision family has; None for an unknown family."""
    starts = [start for start in _FAMILIES if arch.startswith(start)]
    return _FAMILIES[max(starts, key=len)] if starts else None


def _log(fits: Fits) -> None:
    arch, classes = fits[0]
    logger.info("the checkpoint fits %s with %d classes", arch, classes)
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
        f"none. Nearest: {'. '.join(near)}. {NAME_IT}"
    )


def _likeness(have: Mapping[str, Shape], want: Mapping[str, Shape]) -> float:
    """0 to 2: overlap of the named shapes, plus overlap of the shapes without names."""
    named = len(have.items() & want.items()) / max(1, len(have.keys() | want.keys()))
    a, b = Counter(have.values()), Counter(want.values())
    return named + (a & b).total() / max(1, (a | b).total())
