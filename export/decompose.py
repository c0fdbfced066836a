"""Decompose an exported program where torch.onnx cannot translate it, and nowhere else.

`ExportedProgram.run_decompositions`, which torch.onnx calls, traces the whole network several
times, half of a lowering, for what are a pooling and a flattening in most. Here each operator is
traced by itself, and what it consists of takes its place: files are the same, byte for byte. A
program that overwrites tensors, or that holds another program, goes the long way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

_SIZE = torch.ops.aten.sym_size.int
_COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd
Table = Mapping[Any, Callable[..., Any]]


@contextlib.contextmanager
def locally() -> Iterator[None]:
    """Within, programs are decomposed operator by operator."""
    whole: Callable[..., ExportedProgram] = ExportedProgram.run_decompositions

    def decomposed(program: ExportedProgram, table: Table) -> ExportedProgram:
        nodes = list(program.graph.nodes)
        if _are_plain(nodes):
            parts = {n: _traced(n, table) for n in nodes if _is_composed(n, table)}
            if all(_are_plain(part.nodes) for part in parts.values()):
                return _replaced(program, parts)
        return whole(program, dict(table))

    ExportedProgram.run_decompositions = decomposed  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = whole  # type: ignore[method-assign]


def _are_plain(nodes: Iterable[fx.Node]) -> bool:
    """Whether nodes overwrite nothing, in no mode, and call no program."""
    calls = [node.target for node in nodes if node.op not in ("placeholder", "output")]
    return all(
        not target._schema.is_mutable and torch.Tag.maybe_aliasing_or_mutating not in target.tags
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__module__", "") in ("_operator", "math", "torch")
        for target in calls
    )


def _is_composed(node: fx.Node, table: Table) -> bool:
    """Whether an operator is to be taken apart; torch always does that to views like flatten."""
    return node.target in table or (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.has_kernel_for_dispatch_key(_COMPOSED)
        and any(argument.alias_info for argument in node.target._schema.arguments)
    )


def _traced(node: fx.Node, table: Table) -> fx.Graph:
    """What an operator consists of: a graph with a placeholder for each node that it reads."""

    def run(*values: Any) -> Any:
        given = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        composed: Any = table.get(node.target, node.target)
        return composed(*args, **kwargs)

    trace = make_fx(run, dict(table), "symbolic", _allow_non_fake_inputs=True)
    return trace(*(read.meta["val"] for read in node.all_input_nodes)).graph


def _replaced(program: ExportedProgram, found: Mapping[fx.Node, fx.Graph]) -> ExportedProgram:
    """Put graphs in the place of nodes, in place."""
    graph = program.graph
    sizes, reads = _sizes(graph), {node: node.all_input_nodes for node in found}
    taken: dict[fx.Node, fx.Node] = {}
    for node, part in found.items():
        given = (taken.get(read, read) for read in reads[node])
        places = dict(zip(part.find_nodes(op="placeholder"), given, strict=True))
        for read in part.find_nodes(op="call_function", target=_SIZE):
            if (size := str(read.meta["val"])) in sizes:
                places[read] = sizes[size]
        with graph.inserting_before(node):
            made = graph.graph_copy(part, places)
        one = isinstance(made, fx.Node)
        ends = {node: made} if one else {user: made[user.args[1]] for user in node.users}
        for old, new in ends.items():
            old.replace_all_uses_with(new)
            program.graph_signature.replace_all_uses(old.name, new.name)
        taken |= ends
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _sizes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Nodes that give the free sizes of a graph, each read from the first input that has it."""
    inputs, found = graph.find_nodes(op="placeholder"), dict[str, fx.Node]()
    for given in inputs:
        for dim, size in enumerate(getattr(given.meta.get("val"), "shape", ())):
            if isinstance(size, torch.SymInt) and str(size) not in found:
                with graph.inserting_after(inputs[-1]):
                    found[str(size)] = graph.call_function(_SIZE, (given, dim))
                found[str(size)].meta["val"] = size
    return found
