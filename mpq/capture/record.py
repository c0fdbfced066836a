"""Record one run of a network as a graph of what it did, in the words of Python.

A `TorchFunctionMode` sees every torch function, method and operator; two global module hooks see
every module call. Modules of torch itself become `call_module`, everything else `call_function` or
`call_method`, named as `torch.fx.symbolic_trace` names them, at the module paths of the network.
Nothing is symbolic while it runs: Python sees tensors, so any code may ask for types and shapes.
What one run cannot show is refused: a Python value that was read from a tensor that depends on the
input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from mpq.capture.memory import Memory, with_item
from mpq.capture.nested import leaves, plain_containers, rebuilt, tensors
from mpq.capture.network import Network
from mpq.capture.refuse import SECOND_NAME, VALUE, Place, Refused, here
from mpq.capture.running import as_written
from mpq.capture.sizes import Ratio, Size, plain, sized
from mpq.capture.vocabulary import VALUES, call_of, is_leaf, is_question, is_random, name_of
from mpq.hooks import hooked


@dataclass(frozen=True, slots=True)
class Guard:
    """A comparison of sizes that steered Python, with its answer in the recorded run."""

    node: fx.Node
    answer: bool
    place: Place


@dataclass
class Record:
    """What was recorded.

    Args:
        graph: placeholders are the network's inputs; the output has the network's structure.
        guards: comparisons of sizes; their nodes are in the graph.
        fixed: places where a size was read as a plain number.
        constants: buffers made for tensors that the forward made or took from elsewhere.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    guards: list[Guard] = field(default_factory=list)
    fixed: dict[Place, None] = field(default_factory=dict)
    constants: dict[str, Place] = field(default_factory=dict)


def record(network: Network, kept: frozenset[str] = frozenset()) -> Record:
    """Run a network once and write down what it does.

    Args:
        network: its module is run as it is, and gets a buffer for every constant of its forward.
        kept: paths of modules that are not looked into.

    Raises:
        Refused: Python asked for a value that depends on the input.
    """
    recorder = _Recorder(network.module, kept)
    network = network.map(lambda t: t.detach().clone())
    for name, value in network.inputs.items():
        recorder.take(name, value)
    with as_written(), recorder.watching():
        answer = network.module(*network.args, **network.kwargs)
    recorder.finish(answer)
    return recorder.record


class _Recorder(TorchFunctionMode):
    """The state of one recording: which node gives which tensor."""

    def __init__(self, model: nn.Module, kept: frozenset[str]) -> None:
        super().__init__()
        self.model, self.kept = model, kept
        self.record, self.memory = Record(), Memory()
        self.paths: dict[int, str] = {id(m): path for path, m in model.named_modules()}
        self.owned: dict[int, str] = {}  # the network's own tensors, with their path
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self.stale: set[int] = set()  # overwritten under another name
        self.depends: set[fx.Node] = set()  # on the input, or only on its sizes
        self.on_values: set[fx.Node] = set()  # on what the input holds
        self.home: tuple[torch.device, fx.Node] | None = None  # of the first input
        self.inside: list[str] = []
        self.hidden = 0  # how many modules that are not looked into are running
        self.versions: list[tuple[Tensor, int]] = []
        for path, module in model.named_modules():
            for own in (vars(module), module._parameters, module._buffers):
                for name, value in own.items():
                    if isinstance(value, Tensor):
                        self.owned.setdefault(id(value), f"{path}.{name}".lstrip("."))

    # -- begin and end -------------------------------------------------------------------------

    def take(self, name: str, value: Any) -> None:
        """An argument of the network becomes an input of the graph."""
        node = self.record.graph.placeholder(name)
        self.depends.add(node)
        self.on_values.add(node)
        self.learn(value, node)
        if self.home is None:
            self.home = tensors(value)[0].device, self.nodes[id(tensors(value)[0])][1]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See every call of a function and of a module."""
        handles = (
            hooks.register_module_forward_pre_hook(self.enter),
            hooks.register_module_forward_hook(self.leave, with_kwargs=True),
        )
        with hooked(handles), self:
            yield

    def finish(self, answer: Any) -> None:
        """Write the output, and drop questions that nobody needs."""
        self.record.graph.output(self.written(plain_containers(answer)))
        guards = {guard.node for guard in self.record.guards}
        for node in reversed(self.record.graph.nodes):
            if not node.users and node not in guards and is_question(node):
                self.record.graph.erase_node(node)

    # -- values and nodes ----------------------------------------------------------------------

    def written(self, value: Any) -> Any:
        """A nesting of values as an argument in the graph: nodes in place of tensors and sizes."""
        return rebuilt(value, self._written)

    def _written(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.device):
            return self.device(value)
        return value.node if isinstance(value, (Size, Ratio)) else value

    def device(self, device: torch.device) -> Any:
        """Where the input lives: a graph makes its tensors there, wherever it is moved."""
        if self.home is None or device != self.home[0]:
            return device
        with self.record.graph.inserting_after(self.home[1]):
            return self.record.graph.call_function(getattr, (self.home[1], "device"))

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gives what a tensor holds now."""
        if id(tensor) in self.stale:
            self.read_again(tensor)
        if id(tensor) not in self.nodes:
            path = self.owned.get(id(tensor)) or self.constant(tensor)
            self.nodes[id(tensor)] = tensor, self.record.graph.get_attr(path)
            self.memory.add(tensor)
        return self.nodes[id(tensor)][1]

    def constant(self, tensor: Tensor) -> str:
        """The path of a new buffer with what a tensor holds now."""
        count = len(self.record.constants)
        while hasattr(self.model, path := f"_tensor_constant{count}"):
            count += 1
        self.model.register_buffer(path, tensor.detach().clone())
        self.record.constants[path] = here()
        return path

    def learn(self, value: Any, node: fx.Node) -> None:
        """Remember which node gives a result, and its parts."""
        if isinstance(value, Tensor):
            self.nodes[id(value)] = value, node
            self.stale.discard(id(value))
            self.memory.add(value)
        elif isinstance(value, (tuple, list, dict)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                if tensors(part):
                    self.learn(part, self.emit("call_function", operator.getitem, (node, key)))

    def emit(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """A new node; it depends on what its arguments depend on."""
        node = self.record.graph.create_node(op, target, args, kwargs or {})
        for group in (self.depends, self.on_values):
            if not group.isdisjoint(node.all_input_nodes):
                group.add(node)
        return node

    def depending(self, value: Any, on: set[fx.Node]) -> bool:
        """Whether a nesting holds a tensor of these nodes."""
        return any(id(t) in self.nodes and self.nodes[id(t)][1] in on for t in tensors(value))

    def involved(self, value: Any) -> bool:
        """Whether a nesting holds a tensor of the network or of the graph, or a size."""
        return any(
            isinstance(v, (Size, Ratio)) or id(v) in self.nodes or id(v) in self.owned
            for v in leaves(value)
        )

    # -- functions -----------------------------------------------------------------------------

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A call of torch's."""
        kwargs = kwargs or {}
        if self.hidden or not (self.involved((args, kwargs)) or is_random(function)):
            return function(*args, **kwargs)
        if self.depending(args[:1], self.depends):
            name = name_of(function)
            if name in ("shape", "size", "numel", "nelement", "__len__"):
                return self.question(name, *args, **kwargs)
            if name == "__iter__":
                return self.parts(args[0])
            if name in VALUES:
                self.read(name, args)
        return self.call(function, args, kwargs)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function and write down its node."""
        given = self.written(args), self.written(kwargs)  # before it runs: it may overwrite
        before = [(t, t._version) for t in tensors((args, kwargs))]
        result = function(*rebuilt(args, plain), **rebuilt(kwargs, plain))
        changed = [t for t, version in before if t._version != version]
        if not changed and not tensors(result):
            return result
        if name_of(function) == "__setitem__":
            node = self.emit("call_function", with_item, given[0])
        else:
            node = self.emit(*self.kept_apart(call_of(function, *given), bool(changed)))
        for tensor in changed[:1]:
            self.overwritten(tensor, node)
        if not any(result is t for t in changed):
            self.learn(result, node)
            self.memory.add_view(result, args[0] if args else None, node)
        return result

    def kept_apart(self, call: Any, overwrites: bool) -> Any:
        """A call that overwrites a constant of the forward works on a copy of it."""
        op, target, args, kwargs = call
        first = args[0] if args and isinstance(args[0], fx.Node) else None
        if overwrites and first is not None and first.target in self.record.constants:
            args = (self.emit("call_method", "clone", (first,)), *args[1:])
        return op, target, args, kwargs

    def overwritten(self, tensor: Tensor, node: fx.Node) -> None:
        """A tensor holds what `node` gives; so does what it is a part of."""
        self.learn(tensor, node)
        current, part = {id(tensor)}, tensor
        while (found := self.memory.view(part)) and found[1].target is operator.getitem:
            whole, slicing = found
            args = (self.nodes[id(whole)][1], slicing.args[1], self.nodes[id(part)][1])
            self.learn(whole, self.emit("call_function", with_item, args))
            current.add(id(whole))
            part = whole
        self.stale |= {id(t) for t in self.memory.overlapping(tensor)} - current

    def read_again(self, tensor: Tensor) -> None:
        """Make an overwritten tensor anew from what it is a view of."""
        found = self.memory.view(tensor)
        if found is None:
            raise self.refusal("a tensor is read whose memory was overwritten", SECOND_NAME)
        whole, node = found
        args = (self.node_of(whole), *node.args[1:])
        self.learn(tensor, self.emit(node.op, node.target, args, node.kwargs))

    # -- what Python asks ----------------------------------------------------------------------

    def question(self, name: str, tensor: Tensor, dim: int | None = None) -> Any:
        """The sizes of a tensor, each with its node."""
        if name == "__len__":
            self.fixed(len(tensor))
            return len(tensor)
        if name in ("numel", "nelement"):
            return self.sized(tensor.numel(), "numel", tensor)
        if dim is not None:
            return self.sized(tensor.size(dim), "size", tensor, dim)
        sizes = tensor.size()
        return torch.Size([self.sized(s, "size", tensor, d) for d, s in enumerate(sizes)])

    def sized(self, value: int, method: str, tensor: Tensor, *dim: int) -> Any:
        """A number that a method of a tensor gives."""
        node = self.emit("call_method", method, (self.node_of(tensor), *dim))
        self.on_values.discard(node)
        return sized(value, node, self)

    def parts(self, tensor: Tensor) -> Iterator[Tensor]:
        """The rows of a tensor that is unpacked, or looped over."""
        return iter([self.call(Tensor.__getitem__, (tensor, i), {}) for i in range(len(tensor))])

    def read(self, name: str, args: tuple[Any, ...]) -> None:
        """Refuse a value that depends on the input; note one that depends on its sizes."""
        if self.depending(args, self.on_values):
            raise self.refusal(f"{name} asks what a tensor holds that depends on the input", VALUE)
        self.record.fixed[here()] = None

    def refusal(self, why: str, remedy: str) -> Refused:
        """What to raise at this place."""
        return Refused(f"{here()} ({why})", remedy, self.inside[-1] if self.inside else "")

    def number(self, function: Callable[..., Any], args: tuple[Any, ...], result: Any) -> Any:
        """See `mpq.capture.sizes.Recording`."""
        if self.hidden or isinstance(result, bool) or not isinstance(result, (int, float)):
            return result
        return sized(result, self.emit("call_function", function, self.written(args)), self)

    def compared(self, function: Callable[..., Any], args: tuple[Any, ...], answer: bool) -> None:
        """See `mpq.capture.sizes.Recording`."""
        if not self.hidden:
            node = self.emit("call_function", function, self.written(args))
            self.record.guards.append(Guard(node, answer, here()))

    def fixed(self, value: float) -> None:
        """See `mpq.capture.sizes.Recording`."""
        if not self.hidden:
            self.record.fixed[here()] = None

    # -- modules -------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module is called."""
        path = self.paths.get(id(module))
        if self.hidden or path in self.kept or (path and is_leaf(module)):
            if not self.hidden:
                self.versions = [(t, t._version) for t in tensors(args)]
            self.hidden += 1
        else:
            self.inside.append(path or (self.inside[-1] if self.inside else ""))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        """A module has answered."""
        if not self.hidden:
            self.inside.pop()
            return
        if self.hidden == 1:  # until it is written down: what follows is no part of the network
            given = self.written(tuple(args)), self.written(kwargs)
            node = self.emit("call_module", self.paths[id(module)], *given)
            for tensor in [t for t, version in self.versions if t._version != version][:1]:
                self.overwritten(tensor, node)
            self.learn(result, node)
        self.hidden -= 1
