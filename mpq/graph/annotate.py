"""Decide where quantizers go: from policy and target, onto the graph as `sites` and `plans`.

Insertion reads the result and knows no policy. The rules follow what an integer runtime needs:

- a layer with an integer kernel reads a quantized tensor, and a convolution also writes one (after
  the ReLU it absorbs); a matrix product may write floats, so it writes integers only on demand;
- add, mul, concat, pooling and the sigmoids run as integers when their inputs are quantized and
  their result reaches an integer layer through such operations; a small float factor (a
  squeeze-excite gate) is quantized for their sake;
- a linear layer whose input range is taken at run time (`uint8/dynamic`) reads and writes floats;
- what only float layers read that round their input to 16 bits (`uint16/tensor`) is quantized to 16
  bits, unless an integer layer writes it, and operations between such tensors stay in float;
- operations that move values (max pooling, flatten, slice, zero padding) pass the grid through;
- everything else is a float island, and a quantizer stands after it where a layer reads it.
"""

from __future__ import annotations

import logging

from torch import fx, nn

from mpq.graph.ir import LayerPlan, QuantGraph, Role, Site
from mpq.graph.kinds import kind_of, moves
from mpq.layers import LayerChoice
from mpq.policy import LayerPolicy, Policy
from mpq.spec import DYNAMIC, ROUNDED_16, QuantSpec, activation_spec
from mpq.target import ROUNDED, WIDER, Support
from mpq.targets import get_target

logger = logging.getLogger(__name__)
ABSORBED = ("relu", "relu6")
CEILINGS = {"relu6": 6.0, "hardsigmoid": 1 - 1e-4}
"""Operations whose upper bound is the saturation of the quantizer after them.

The hard-sigmoid's is a little lower, because `hardsigmoid(0) = 1/2`, its most frequent value, would
lie between two integers of a grid that ends at 1, and runtimes would disagree on the rounding.
"""
JOINS = ("add", "mul", "concat")
_TAKEN = frozenset(dir(nn.Module()))
"""What no child of a module can be called: `x.to(y)` makes a node `to`."""


def annotate(qg: QuantGraph, policy: Policy) -> int:
    """Set `qg.policy` and fill `qg.sites` and `qg.plans`; return the number of sites.

    Raises:
        PolicyError: the policy does not fit the network or the target.
    """
    work = _Annotator(qg, policy)
    work.place()
    qg.policy = policy
    qg.sites = {site.name: site for site in work.sites.values()}
    qg.plans = {name: work.plan(name) for name in work.choices}
    return len(qg.sites)


def branch(qg: QuantGraph, policy: Policy) -> int:
    """Where layers read fewer bits than the policy's residual sums, let them read a rounded copy.

    The copy is a LeakyReLU of slope 1, which runtimes have as a table over integers; behind a ReLU
    any slope will do, and the usual one takes no bytes.

    Returns:
        The number of copies.
    """
    residual = policy.default.residual_bits
    if residual is None:
        return 0
    work, copies = _Annotator(qg, policy), 0
    for node in work.nodes:
        if not any(work.kinds[r] == "add" for r in work.readers(node)) or work.moves(node):
            continue
        if takers := [user for user in node.users if work.narrow(user, residual)]:
            name, copies = f"branches.{node.name}", copies + 1
            slope = 0.01 if work.kinds[node] in ABSORBED else 1.0
            qg.module.add_submodule(name, nn.LeakyReLU(slope))
            with qg.module.graph.inserting_after(node):
                copy = qg.module.graph.call_module(name, (node,))
            for user in takers:
                user.replace_input_with(node, copy)
    return copies


def reading_groups(qg: QuantGraph) -> list[list[str]]:
    """Layers that read one tensor and must therefore agree on its format."""
    work = _Annotator(qg, None)
    groups: dict[fx.Node, list[str]] = {}
    for node in work.nodes:
        if work.kinds[node] == "layer":
            groups.setdefault(work.source(node.args[0]), []).append(str(node.target))
    return [names for names in groups.values() if len(names) > 1]


def make_dynamic(qg: QuantGraph, policy: Policy) -> Policy:
    """The policy with `uint8/dynamic` for each linear layer that reads a float operation's result.

    In transformers these are the layers after norms, attention and GELU, whose ranges differ from
    image to image. A layer that reads integers, such as the classifier of a convolutional network,
    stays as it is: its input's grid is there already.

    Raises:
        PolicyError: the policy does not fit the network or the target.
    """
    work = _Annotator(qg, policy)
    work.place()
    names = []
    for node in work.nodes:
        if work.integer_layer(node) and qg.layers[str(node.target)].kind in work.target.dynamic:
            site = work.sites[work.source(node.args[0])]
            if (
                site.role == "demand"
                and work.choices[str(node.target)].activation_bits == DYNAMIC.bits
            ):
                names.append(str(node.target))
    return policy.with_layers(*(LayerPolicy(name=name, activation=DYNAMIC) for name in names))


class _Annotator:
    """The state of one annotation: which tensors are on a grid, and of which format.

    Without a policy it only answers which tensors layers read.
    """

    def __init__(self, qg: QuantGraph, policy: Policy | None) -> None:
        self.qg, self.target = qg, get_target(policy.target if policy else None)
        self.choices = policy.resolve(list(qg.layers)) if policy else {}
        self.residual = policy.default.residual_bits if policy else None
        self.modules: dict[str, nn.Module] = dict(qg.module.named_modules())
        self.nodes = list(qg.module.graph.nodes)
        self.kinds = {n: kind_of(n, self.modules) for n in self.nodes}
        self.sites: dict[fx.Node, Site] = {}
        self._wanted: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):  # from the back, so that no question goes deep
            self.wanted(node)

    # -- questions ---------------------------------------------------------------------------

    def moves(self, node: fx.Node) -> bool:
        """Whether a node only moves or selects values of its first input, on this target."""
        return self.kinds[node] in self.target.moving_ops and moves(node, self.kinds)

    def source(self, node: object) -> fx.Node:
        """The tensor whose values a tensor holds, looking through moves."""
        assert isinstance(node, fx.Node)
        while self.moves(node):
            node = node.args[0]
            assert isinstance(node, fx.Node)
        return node

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read a tensor's values, looking through moves; its shape is no value."""
        found: list[fx.Node] = []
        for user in self.users(node):
            found.extend(self.readers(user) if self.moves(user) else [user])
        return found

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that take a tensor, leaving out those that ask for its shape."""
        return [user for user in node.users if self.kinds[user] != "shape"]

    def integer_layer(self, node: fx.Node) -> bool:
        """Whether a node is a layer that multiplies integers which are there before it runs."""
        if self.kinds[node] != "layer" or str(node.target) not in self.choices:
            return False
        choice = self.choices[str(node.target)]
        return self.support(choice).integer and not choice.dynamic

    def support(self, choice: LayerChoice) -> Support:
        """What the target makes of a layer, given what operation it is."""
        return self.target.support(choice, self.qg.layers[choice.name].operation)

    def rounding_layer(self, node: fx.Node) -> bool:
        """Whether a node is a float layer whose input is rounded to 16 bits."""
        if self.kinds[node] != "layer" or str(node.target) not in self.choices:
            return False
        return self.choices[str(node.target)].exact

    def narrow(self, node: fx.Node, bits: int) -> bool:
        """Whether only integer layers with inputs of fewer bits read what a node passes on."""
        readers = self.readers(node) if self.moves(node) else [node]
        return bool(readers) and all(
            self.integer_layer(r) and (self.choices[str(r.target)].activation_bits or 32) < bits
            for r in readers
        )

    def wide(self, node: fx.Node) -> bool:
        """Whether a tensor gets 16 bits: a layer rounds it so, and none needs it as integers."""
        readers = self.readers(node)
        if self.kinds[node] in ABSORBED and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return (
            any(self.rounding_layer(r) for r in readers)
            and not any(self.integer_layer(r) for r in readers)
            and not self.integer_layer(node)
        )

    def tail(self, node: fx.Node) -> fx.Node:
        """The node itself, or the ReLU after it when nothing else reads it."""
        users = self.users(node)
        if len(users) == 1 and self.kinds[users[0]] in ABSORBED:
            return users[0]
        return node

    def wanted(self, node: fx.Node) -> bool:
        """Whether integers in a tensor are of use.

        They are if an integer layer reads it, or an operation whose own result is so wanted. A
        residual stream that only float islands read stays in float.
        """
        if node not in self._wanted:
            self._wanted[node] = any(
                self.integer_layer(r)
                or (self.kinds[r] in self.target.integer_ops and self.wanted(self.tail(r)))
                for r in self.readers(node)
            )
        return self._wanted[node]

    # -- decisions ---------------------------------------------------------------------------

    def place(self) -> None:
        """Walk the graph once; every decision looks at what was decided before it."""
        for node in self.nodes:
            if self.integer_layer(node):
                self.quantize(self.source(node.args[0]), "demand")
                tail = self.tail(node)
                kind = self.qg.layers[str(node.target)].kind
                if self.wanted(tail) or kind not in self.target.writes_floats:
                    self.quantize(tail, "layer")
            elif self.rounding_layer(node):
                self.quantize(self.source(node.args[0]), "demand")
            elif self.kinds[node] in self.target.integer_ops:
                self.place_op(node)

    def place_op(self, node: fx.Node) -> None:
        """Run an operation as integers if its inputs are, and someone wants its output so."""
        inputs = _data_inputs(node, self.kinds[node])
        if not inputs or not self.wanted(self.tail(node)):
            return
        if any(n.name in self.qg.exact for n in inputs):
            return  # a mask or an index is no number on a grid
        on_grid = [n for n in inputs if self.source(n) in self.sites]
        off_grid = [n for n in inputs if self.source(n) not in self.sites]
        if not on_grid or any(self.kinds[self.source(n)] == "layer" for n in off_grid):
            return  # a 16-bit or float layer's output keeps its precision
        if any(self.wide(n) for n in (*map(self.source, inputs), self.tail(node))):
            return  # so does what is rounded to 16 bits
        if off_grid and self.kinds[node] not in JOINS:
            return
        for n in off_grid:
            self.quantize(self.source(n), "demand")
        self.quantize(self.tail(node), "op")

    def quantize(self, node: fx.Node, role: Role) -> None:
        """Put a quantizer after a node, once."""
        if node in self.sites:
            return
        placed = Site(
            name=f"quantizers.{node.name}{'_site' if node.name in _TAKEN else ''}",
            node=node.name,
            role="input" if node.op == "placeholder" else role,
            spec=self.format(node),
            ceiling=CEILINGS.get(self.kinds[node]),
            readers=tuple(self.layers(node)),
        )
        self.sites[node] = placed

    def layers(self, node: fx.Node) -> list[str]:
        """The layers that read a tensor on a grid."""
        readers = self.readers(node)
        return [str(r.target) for r in readers if self.integer_layer(r) or self.rounding_layer(r)]

    def format(self, node: fx.Node) -> QuantSpec:
        """What suits all that read a tensor."""
        if self.wide(node):
            return ROUNDED_16
        specs = [self.choices[name].activation for name in self.layers(node)]
        narrow = [s for s in specs if s is not None and s.bits <= 8]
        summed = any(self.kinds[r] == "add" for r in self.readers(node))
        alone = activation_spec((summed and self.residual) or 8)
        return max(narrow, key=lambda s: s.bits, default=alone)

    def plan(self, name: str) -> LayerPlan:
        """What becomes of a layer, with the reasons that belong in a report."""
        choice = self.choices[name]
        support = self.support(choice)
        notes = [choice.reason] if choice.reason else []
        node = next((n for n in self.nodes if n.op == "call_module" and n.target == name), None)
        if node is None:
            notes.append("inside a module that cannot be traced: quantized on its own")
        if not support.integer:
            notes.append(support.reason)
        if choice.exact:
            notes.append(ROUNDED.format(16))
        if node is None or choice.dynamic or not (support.integer or choice.exact):
            return LayerPlan(choice, support, None, tuple(notes))
        site = self.sites[self.source(node.args[0])]
        if choice.activation and site.spec.bits != choice.activation.bits:
            notes.append(WIDER.format(site.spec.bits))
        return LayerPlan(choice, support, site.name if support.integer else None, tuple(notes))


def _data_inputs(node: fx.Node, kind: str) -> list[fx.Node]:
    """Tensor inputs of an operation; empty where a number takes part (scaling stays float)."""
    args: tuple[object, ...] = node.args[:1]
    if kind in JOINS:
        args = tuple(node.args[0]) if kind == "concat" else node.args[:2]  # type: ignore[arg-type]
    nodes = [a for a in args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return nodes if len(nodes) == len(args) else []
