"""The graph of the exported file as rows and lanes, as `git log --graph` draws a history.

A row is a node that computes something: quantizers, the decoding of weights and what is fused into
the node before are part of it. A lane carries a value from the row that makes it down to its last
reader, so that a branch is seen beside the main line, in twenty rows as in five hundred.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import shape_inference

from mpq.export.executed import constant_roots
from mpq.export.operators import MOVES

Json = Mapping[str, Any]
CODING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"})
"""What turns floats into integers and back, which is no row of its own."""
FUSED = frozenset({"Relu", "Clip", "Max"})


@dataclass(frozen=True, slots=True)
class Row:
    """A node.

    Args:
        name: the module path of a layer; empty for what is none.
        op: its operation, with what is fused into it: `Conv + Relu`.
        widths: as asked, `W4A8`; empty for what is no layer.
        shape: of its output without the batch, `16 x 32 x 32`; empty where it is not known.
        integer: whether it runs on integers.
        reason: why not, where that is known.
        inputs: rows that it reads; -1 is the network's input.
        lane: where it stands.
    """

    name: str
    op: str
    widths: str
    shape: str
    integer: bool
    reason: str
    inputs: tuple[int, ...]
    lane: int = 0

    @property
    def bits(self) -> str:
        """Width of the weights, as the page colours it: `4`, `float`, or empty for no layer."""
        asked = self.widths.split()[0] if self.widths else ""
        return asked[1 : asked.index("A")] if asked.startswith("W") and "A" in asked else ""


def rows(path: Path, certificate: Json | None) -> list[Row]:
    """The rows of an ONNX file; what the certificate says of a layer counts, else its neighbours.

    Args:
        path: the file.
        certificate: the content of its `certificate.json`, where there is one.
    """
    graph = onnx.load(path, load_external_data=False).graph
    proven = {row["name"]: row for row in (certificate or {"layers": ()})["layers"]}
    return _placed(_Reader(graph, proven, _shapes(path)).rows())


def _shapes(path: Path) -> dict[str, str]:
    """Shapes of values without their first dimension."""
    model = onnx.load(path, load_external_data=False)
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    found = {}
    for value in (*inferred.value_info, *inferred.output):
        sizes = [d.dim_value or d.dim_param or "?" for d in value.type.tensor_type.shape.dim][1:]
        found[value.name] = " \N{MULTIPLICATION SIGN} ".join(map(str, sizes))
    return found


class _Reader:
    """One walk through the nodes in the order of the file."""

    def __init__(
        self, graph: onnx.GraphProto, proven: Mapping[str, Json], shapes: Mapping[str, str]
    ) -> None:
        self.graph, self.proven, self.shapes = graph, proven, shapes
        self.constants = constant_roots(graph)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.source = {value.name: -1 for value in graph.input}
        """The row that each value comes from."""
        self.integers: set[str] = set()
        """Values that are integers, or stand for integers of a quantizer."""

    def rows(self) -> list[Row]:
        found: list[Row] = []
        for node in self.graph.node:
            data = [name for name in node.input if name in self.source]
            if not data or node.output[0] in self.constants:
                continue
            if node.op_type in CODING:
                coded = node.op_type != "Cast" or data[0] in self.integers
                self._set(node, self.source[data[0]], coded)
            elif node.op_type in FUSED and len(data) == 1 and self._fuses(found, data[0]):
                last = self.source[data[0]]
                found[last] = replace(found[last], op=f"{found[last].op} + {node.op_type}")
                self._set(node, last, data[0] in self.integers)
            else:
                found.append(self._row(node, data))
                self._set(node, len(found) - 1, node.op_type in MOVES and self._all(data))
        return found

    def _set(self, node: onnx.NodeProto, row: int, integer: bool) -> None:
        for name in node.output:
            self.source[name] = row
            self.integers |= {name} if integer else set()

    def _all(self, data: Iterable[str]) -> bool:
        return all(name in self.integers for name in data)

    def _fuses(self, found: list[Row], name: str) -> bool:
        """Whether an activation belongs to the row that it reads, which has no other reader."""
        last = self.source[name]
        return last >= 0 and len(self.readers[name]) == 1 and found[last].op in _TAKES

    def _row(self, node: onnx.NodeProto, data: list[str]) -> Row:
        proof = self.proven.get(node.name) or self.proven.get(node.output[0])
        widths, reason = "", ""
        if proof is not None:
            integer, reason = bool(proof["integer"]), proof["reason"]
            widths = proof["asked"] if proof["asked"] != "-" else proof["stored"]
        else:
            moved = node.op_type in MOVES
            integer = self._all(data) and (moved or self._rounded(node.output[0]))
        return Row(
            name=node.name if proof else "",
            op=node.op_type,
            widths=widths,
            shape=self.shapes.get(node.output[0], ""),
            integer=integer,
            reason=reason,
            inputs=tuple(dict.fromkeys(self.source[name] for name in data)),
        )

    def _rounded(self, name: str) -> bool:
        """Whether all readers of a value round it to integers, behind what is fused."""
        readers = self.readers.get(name, [])
        return bool(readers) and all(
            r.op_type == "QuantizeLinear" or (r.op_type in FUSED and self._rounded(r.output[0]))
            for r in readers
        )


_TAKES = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul"})
"""Operations that a runtime fuses an activation into."""


_FREE = -2


def _placed(found: list[Row]) -> list[Row]:
    """The rows with their lanes: a value keeps its lane until its last reader took it."""
    last = {i: i for i in range(-1, len(found))}
    for i, row in enumerate(found):
        last.update(dict.fromkeys(row.inputs, i))
    lanes, placed = [-1], []
    for i, row in enumerate(found):
        done = [k for k, source in enumerate(lanes) if source in row.inputs and last[source] == i]
        for k in done:
            lanes[k] = _FREE
        lane = min(done, default=lanes.index(_FREE) if _FREE in lanes else len(lanes))
        lanes += [_FREE] * (lane + 1 - len(lanes))
        lanes[lane] = i if last[i] > i else _FREE
        placed.append(replace(row, lane=lane))
    return placed


def begins_float(found: list[Row]) -> list[int]:
    """Rows in float that read integers: where float begins."""
    return [
        i
        for i, row in enumerate(found)
        if not row.integer and any(k < 0 or found[k].integer for k in row.inputs)
    ]
