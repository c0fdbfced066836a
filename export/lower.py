"""Lower a graph to ONNX: torch's exporter with our translations, then our placement and storage.

    GraphModule -> torch.onnx -> tie -> simplify -> place -> form -> pack -> slim -> ir.Model

`tie` writes the module path of each layer into the metadata of its matrix node, and that of each
site into its QuantizeLinear's. Rewriting hands metadata on.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from torch import Tensor, fx

from mpq.axes import axes_of
from mpq.errors import ExportError
from mpq.graph.ir import QuantGraph
from mpq.policy import Policy
from mpq.quant.fake_quant import FrozenQuant
from mpq.quant.layer import FrozenLayer, IslandLayer
from mpq.target import Target

from . import opset
from .decompose import locally
from .edit import LAYER, SITE, Step, run
from .ends import Ends, flattened, name_ends
from .form import BYTE_SHUFFLE, Form, Int4Format, choose_form
from .groups import merge_groups
from .operators import LAYER_OPS
from .pack import pack
from .pixels import PixelInput, take_pixels
from .place import place
from .qdq import TRANSLATIONS
from .slim import OPSET, slim
from .upsample import PLAIN_SHUFFLE

_GROW = frozenset({"Gather", "GatherND", "Resize", "Tile", "Expand"})
_KEEP = frozenset({
    *("Mul", "Cast", "Reshape", "Transpose", "Pad", "DequantizeLinear", "QuantizeLinear"),
})  # fmt: skip


@dataclass(frozen=True)
class Lowered:
    """A lowered model and where its parts are.

    Args:
        model: the ONNX model.
        sites: module path of each quantizer -> name of the uint8 value that holds its integers.
        layers: module path of each layer that has a matrix node of that name.
        form: how it is written.
        policy: what was asked of the graph; None of one in float.
    """

    model: ir.Model
    sites: dict[str, str]
    layers: tuple[str, ...]
    form: Form
    policy: Policy | None = None


def lower(
    qg: QuantGraph,
    form: Form | None = None,
    pixels: PixelInput | None = None,
    ends: Ends | None = None,
) -> Lowered:
    """Lower a graph in stage `frozen` (quantized) or `float` (the reference).

    Args:
        qg: the graph.
        form: how the file is to be written; None: the default for its widths.
        pixels: raw images as input; None: normalized ones.
        ends: names of inputs and outputs, and which sizes are free.

    Raises:
        ExportError: the exporter does not know an operation, or a layer got lost on the way.
    """
    if qg.stage not in ("float", "frozen"):
        raise ExportError(
            f"only a float or frozen graph can be lowered. Got stage {qg.stage!r}; "
            "call mpq.freeze first."
        )
    ends = ends or Ends()
    model, form = _export(qg, ends.free), form or form_for(qg)
    _tie(model, qg)
    _simplify(model)
    place(model)
    if pixels is not None:
        take_pixels(model, pixels)
    run(model, _steps(form))
    pack(model, _widths(qg), form)
    name_ends(model, *ends.names(qg))
    sites = slim(model)
    opset.set_opset(model, form)
    layers = tuple(str(n.name) for n in model.graph if n.name in qg.layers)
    missing = [name for name in qg.layers if name not in layers]
    if missing:
        raise ExportError(f"layers {missing} have no node in the exported graph.")
    return Lowered(model, sites, layers, form, qg.policy)


def _steps(form: Form) -> Iterator[Step]:
    """What a form needs to be rewritten."""
    if form.needs < BYTE_SHUFFLE:
        yield PLAIN_SHUFFLE
    yield from opset.steps(form)
    if form.int4 != "dq":  # a form for other runtimes, which may not fold what spreads the weights
        yield merge_groups


def form_for(
    qg: QuantGraph,
    *,
    int4_format: Int4Format | None = None,
    min_runtime: str | None = None,
    target: Target | None = None,
) -> Form:
    """The form for what a graph holds (see `mpq.export.form.choose_form`)."""
    return choose_form(
        set(_widths(qg).values()),
        int4_format=int4_format,
        min_runtime=min_runtime,
        rounds_16=any(plan.choice.exact for plan in qg.plans.values()),
        shuffles=any(isinstance(m, FrozenLayer) and m.interleaves for m in qg.module.modules()),
        target=target,
    )


def _widths(qg: QuantGraph) -> dict[str, int]:
    return {n: p.support.stored.bits for n, p in qg.plans.items() if p.support.stored is not None}


def _export(qg: QuantGraph, free: tuple[str, ...]) -> ir.Model:
    module, example = flattened(qg)
    module = _contiguous(module)
    example = tuple(t[:1].expand(2, *t.shape[1:]).contiguous() if t.ndim else t for t in example)
    names = {name: torch.export.Dim(name) for name in free}
    shapes = [{d: names[n] for d, n in axes.items()} for axes in axes_of(example, free)]
    translate = partial(
        torch.onnx.export,
        module,
        example,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=tuple(shapes),
        custom_translation_table=TRANSLATIONS,
        input_names=[f"mpq.input.{i}" for i in range(len(example))],
        output_names=[f"mpq.output.{i}" for i in range(len(qg.outputs))],
        verbose=False,
        optimize=False,
    )
    try:
        with _quiet():
            try:
                with locally():
                    program = translate()
            except Exception:  # an operator that only the long way takes apart
                program = translate()
    except Exception as error:
        _check_samples(module, example)
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        if found := re.search(r"target=torch\.ops\.(?:aten\.)?(\w+)", reason):
            reason = f"ONNX has no form of {found[1]} as it is called here"
        raise ExportError(
            f"torch.onnx cannot export the model: {reason}. Replace that operation, or move it out "
            "of the network."
        ) from error
    assert program is not None
    common.InlinePass()(program.model)
    _check_free(program.model, qg.inputs, axes_of(example, free))
    return program.model


def _contiguous(module: fx.GraphModule) -> fx.GraphModule:
    """The module with strides as a file has them: those of `channels_last` come into the graph.

    A pooling in that layout is followed by a gathering of its values by computed indices.
    """
    if all(t.is_contiguous() for t in itertools.chain(module.parameters(), module.buffers())):
        return module
    module = copy.deepcopy(module)
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return module


def _check_samples(module: torch.nn.Module, example: tuple[Tensor, ...]) -> None:
    """Refuse a network whose inputs have no samples as first size, such as a list of pictures."""
    try:
        with torch.no_grad():
            module(*example)
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in example)
        raise ExportError(
            f"inputs must have the samples as their first size, but the network does not run on "
            f"two: {shapes}: {str(error).partition(chr(10))[0]}. Of a detector that takes a list "
            "of pictures, export backbone and heads, which take a batch."
        ) from error


def _check_free(model: ir.Model, inputs: tuple[str, ...], axes: list[dict[int, str]]) -> None:
    """Refuse a file that holds sizes of the example: the exporter gives in where it must."""
    for value, name, own in zip(model.graph.inputs, inputs, axes, strict=True):
        for dim, size in own.items():
            if value.shape is not None and isinstance(value.shape[dim], int):
                raise ExportError(
                    f"the {size} of input {name} must be free but the network holds it at "
                    f"{value.shape[dim]}: a step counts on it, such as splitting what was "
                    "concatenated along the batch. Write that step with slices of x.shape."
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs and warns of its own inner life, which helps no user of ours."""
    loggers = [logging.getLogger(n) for n in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def _tie(model: ir.Model, qg: QuantGraph) -> None:
    """Note each layer's path in its matrix node, each site's in its QuantizeLinear.

    An initializer has one of the names that its tensor has in the module. Layers that share their
    weights come in the order in which they run, and so do the nodes that read them.
    """
    initializers = model.graph.initializers
    tensors = qg.module.state_dict(keep_vars=True).items()
    values = {id(t): initializers[name] for name, t in tensors if name in initializers}
    _tie_sites(qg, values)
    _tie_layers(qg, values)


def _tie_sites(qg: QuantGraph, values: dict[int, ir.Value]) -> None:
    for path, module in qg.module.named_modules():
        scale = values.get(id(module.scale)) if isinstance(module, FrozenQuant) else None
        for node, _ in () if scale is None else scale.uses():
            if node.op_type == "QuantizeLinear":
                node.metadata_props[SITE] = path


def _tie_layers(qg: QuantGraph, values: dict[int, ir.Value]) -> None:
    paths: dict[ir.Value, list[str]] = {}
    for path in qg.layers:
        module = qg.module.get_submodule(path)
        layer = module.layer if isinstance(module, IslandLayer) else module
        if id(layer.weight) in values:
            paths.setdefault(values[id(layer.weight)], []).append(path)
    for weight, owners in paths.items():
        for index, node in enumerate(_matrix_nodes(weight)):
            node.metadata_props[LAYER] = owners[min(index, len(owners) - 1)]


def _matrix_nodes(weight: ir.Value) -> Iterator[ir.Node]:
    """The matrix nodes that read a weight, through what decodes and turns it."""
    for node, _ in weight.uses():
        if node.op_type in LAYER_OPS:
            yield node
        else:
            for out in node.outputs:
                yield from _matrix_nodes(out)


def _simplify(model: ir.Model) -> None:
    """Fold and rewrite what the exporter leaves, in two rounds, without merging anything."""
    with _quiet():
        for _ in range(2):
            fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
            rewrite(model)
            _register_bounds(model.graph)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _register_bounds(graph: ir.Graph) -> None:
    """Onnxscript gives the bounds of all clips of one tensor the same names, and keeps one pair."""
    known = graph.initializers
    for value in [v for node in graph for v in node.inputs if v is not None]:
        if value.const_value is None or value.producer() is not None or value.name is None:
            continue
        if known.get(value.name) is not value and not value.is_graph_input():
            free = (f"{value.name}_{k}" for k in itertools.count())
            value.name = next(name for name in free if name not in known)
            known[value.name] = value


def _should_fold(node: ir.Node) -> bool | None:
    """What makes more of what is stored must stay in the graph: the runtime folds it, not the file.

    Decoding of weights; tables that are looked up more often than they are long, as the bias by
    relative position is in window attention; positions that are stretched to the size of the image.
    """
    constants = [v.const_value for v in node.inputs if v is not None and v.is_initializer()]
    stored = [tensor for tensor in constants if tensor is not None]
    if node.op_type in _KEEP and stored:
        return False
    shape = node.outputs[0].shape
    if node.op_type not in _GROW or not stored or shape is None or not shape.is_static():
        return None
    made = math.prod(shape.numpy()) * stored[0].dtype.itemsize
    return False if made > sum(tensor.nbytes for tensor in stored) else None
