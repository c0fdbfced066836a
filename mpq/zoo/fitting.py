"""Put weights into a network of a named architecture, whatever their number of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mpq.capture.network import Network
from mpq.errors import CheckpointError
from mpq.zoo.parts import Part
from mpq.zoo.spelling import Shape, differences, shapes_of, short_names, spellings

Make = Callable[[int], nn.Module]


@dataclass(frozen=True, slots=True)
class Fit:
    """A network, its number of outputs, and the tensors of a checkpoint by its own names."""

    network: nn.Module
    classes: int
    state: dict[str, Tensor]

    def loaded(self) -> nn.Module:
        """The network with these tensors in it; counters stay as they are."""
        self.network.load_state_dict({**self.network.state_dict(), **self.state})
        return self.network


@dataclass(frozen=True, slots=True)
class Recognized:
    """What a file turned out to be.

    Args:
        network: it, with its weights, float32, in evaluation mode.
        arch: a name that `build` takes, or where a pickled module's class lies.
        classes: outputs of the last layer.
        input: `(C, H, W)` of its images.
        told: which of several weights were taken and what was left out, in words.
        normalize: how its images are normalized, if the file says so.
        call: an example call, of a network that takes anything but one batch of images.
    """

    network: nn.Module
    arch: str
    classes: int
    input: tuple[int, int, int]
    told: str = ""
    normalize: str = ""
    call: Network | None = None


class Fitting:
    """Networks of one architecture, built until one takes all tensors of a part and no other.

    Args:
        arch: its name, for messages.
        make: builds a network with so many outputs.
        classes: outputs where weights do not tell.
        head: name of its last weight, whose outputs are the classes, where that is known.
    """

    def __init__(self, arch: str, make: Make, classes: int, head: str | None = None) -> None:
        self.arch, self.make, self.classes, self.head = arch, make, classes, head
        self._built: dict[int, _Built] = {}

    def fit(self, part: Part) -> Fit | None:
        """The network with a place for each tensor of a part, or None."""
        if self._built and len(self._any.shapes) != len(part.plain):
            return None
        classes = outputs_of(shapes_of(part.plain), self.head) or self.classes
        for state in spellings(part.plain):
            shapes, built = shapes_of(state), self._build(classes)
            if shapes == built.shapes:
                return built.filled(state, outputs_of(shapes, self.head) or 1)
            if shapes.keys() == built.shapes.keys():
                solved = self._solve(classes, shapes)
                if self._build(solved).shapes == shapes:
                    return self._build(solved).filled(state, solved)
        return None

    def refusal(self, parts: Sequence[Part]) -> str:
        """What the nearest of the parts that do not fit differs in."""
        shapes = self._any.shapes
        near = max(parts, key=lambda part: len(part.plain.keys() & shapes.keys()))
        have = shapes_of(near.plain)
        classes = outputs_of(have, self.head)
        hint = (
            "Leave --model away to have the network found, or give the function that builds it "
            "with --model package.module:factory."
        )
        alike = ":" in self.arch and have.keys() == shapes.keys()  # code of the user's own
        if alike and classes != outputs_of(shapes, self.head):
            hint = (
                f"Give {self.arch} a parameter num_classes, which it is called with, or make it "
                f"build a network of {classes} classes."
            )
        return (
            f"the weights{f' under {near.name}' if near.name else ''} must be those of "
            f"{self.arch}, but differ: {differences(have, shapes)}. {hint}"
        )

    @property
    def _any(self) -> _Built:
        return next(iter(self._built.values()))

    def _build(self, classes: int) -> _Built:
        if classes not in self._built:
            network = self.make(classes)
            state = network.state_dict()
            names = short_names(state)
            shapes = {short: tuple(state[name].shape) for short, name in names.items()}
            self._built[classes] = _Built(network, state, names, shapes)
        return self._built[classes]

    def _solve(self, classes: int, wanted: Mapping[str, Shape]) -> int:
        """The number of classes under which a size that depends on it is as wanted."""
        one, two = self._build(classes).shapes, self._build(classes + 1).shapes
        for name, shape in one.items():
            for size, more, want in zip(shape, two[name], wanted[name], strict=False):
                if size != more:
                    return max(1, classes + (want - size) // (more - size))
        return classes


@dataclass(frozen=True, slots=True)
class _Built:
    """A network; `names` are full by short ones, and `shapes` go by the short ones."""

    network: nn.Module
    state: dict[str, Tensor]
    names: dict[str, str]
    shapes: dict[str, Shape]

    def filled(self, state: Mapping[str, Tensor], classes: int) -> Fit:
        """With tensors that have its short names.

        Raises:
            CheckpointError: one of integers or bools where floats must be, or the reverse.
        """
        found = {self.names[short]: tensor for short, tensor in state.items()}
        for name, tensor in found.items():
            own = self.state[name]
            if tensor.is_floating_point() != own.is_floating_point():
                kind = "floats" if own.is_floating_point() else str(own.dtype)
                raise CheckpointError(
                    f"{name} must be {kind}, but is {tensor.dtype}. mpq starts from the float "
                    "network."
                )
        return Fit(self.network, classes, found)


def outputs_of(shapes: Mapping[str, Shape], head: str | None) -> int | None:
    """Outputs of the head, by whatever spelling; else of the last weight. None without such."""
    if head is not None:
        shape = next((s[head] for s in spellings(shapes) if s.get(head)), None)
        return shape[0] if shape else None
    weights = [s for name, s in shapes.items() if name.endswith("weight") and len(s) in (2, 4)]
    return weights[-1][0] if weights else None
