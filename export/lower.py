"""Lower a graph to ONNX: torch's exporter with our translations, then our placement and storage.

    GraphModule -> torch.onnx -> simplify -> tag -> place -> pack -> slim -> set_opset -> ir.Model

`tag` ties node names to module paths: the matrix node of a layer carries the layer's path, the
QuantizeLinear of a site the site's. It reads them off the exporter's initializer names, so it runs
after the rewriting (which replaces nodes) and before the merging (which drops initializers).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite

from mpq.errors import ExportError
from mpq.graph.ir import QuantGraph
from mpq.policy import Policy
from mpq.quant.fake_quant import FrozenQuant
from mpq.quant.layer import FrozenLayer

from .form import BYTE_SHUFFLE, Form, Int4Format, choose_form
from .groups import merge_groups
from .opset import set_opset
from .pack import pack, weight_names
from .pixels import PixelInput, take_pixels
from .place import place
from .qdq import TRANSLATIONS
from .slim import OPSET, slim
from .upsample import plain_shuffles

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"})
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


def lower(qg: QuantGraph, form: Form | None = None, pixels: PixelInput | None = None) -> Lowered:
    """Lower a graph in stage `frozen` (quantized) or `float` (the reference).

    Args:
        qg: the graph.
        form: how the file is to be written; None: the default for its widths.
        pixels: raw images as input; None: normalized ones.

    Raises:
        ExportError: the exporter does not know an operation, or a layer got lost on the way.
    """
    if qg.stage not in ("float", "frozen"):
        raise ExportError(
            f"only a float or frozen graph can be lowered. Got stage {qg.stage!r}; "
            "call mpq.freeze first."
        )
    quantizers = [n for n, m in qg.module.named_modules() if isinstance(m, FrozenQuant)]
    model = _simplify(_export(qg))
    _tag(model, list(qg.layers), quantizers)
    place(model)
    if pixels is not None:
        take_pixels(model, pixels)
    form = form or form_for(qg)
    if form.needs < BYTE_SHUFFLE:
        plain_shuffles(model.graph)
    if form.int4 != "dq":  # a form for other runtimes, which may not fold what spreads the weights
        merge_groups(model.graph)
    pack(model, _widths(qg), form)
    sites = slim(model, frozenset(qg.layers), frozenset(quantizers))
    set_opset(model, form)
    layers = tuple(str(n.name) for n in model.graph if n.name in qg.layers)
    missing = [name for name in qg.layers if name not in layers]
    if missing:
        raise ExportError(f"layers {missing} have no node in the exported graph.")
    return Lowered(model, sites, layers, form, qg.policy)


def form_for(
    qg: QuantGraph, *, int4_format: Int4Format | None = None, min_runtime: str | None = None
) -> Form:
    """The form for what a graph holds (see `mpq.export.form.choose_form`)."""
    return choose_form(
        set(_widths(qg).values()),
        int4_format=int4_format,
        min_runtime=min_runtime,
        rounds_16=any(plan.choice.exact for plan in qg.plans.values()),
        shuffles=any(isinstance(m, FrozenLayer) and m.interleaves for m in qg.module.modules()),
    )


def _widths(qg: QuantGraph) -> dict[str, int]:
    return {n: p.support.stored.bits for n, p in qg.plans.items() if p.support.stored is not None}


def _export(qg: QuantGraph) -> ir.Model:
    example = qg.example[:1].expand(2, *qg.example.shape[1:]).contiguous()
    try:
        with _quiet():
            program = torch.onnx.export(
                qg.module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=TRANSLATIONS,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
                optimize=False,
            )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"torch.onnx cannot export the model: {reason}. Replace that operation, or move it out "
            "of the network."
        ) from error
    assert program is not None
    return program.model


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


def _simplify(model: ir.Model) -> ir.Model:
    """Fold and rewrite what the exporter leaves, in two rounds, without merging anything."""
    with _quiet():
        common.InlinePass()(model)
        for _ in range(2):
            fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
            model = rewrite(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def _tag(model: ir.Model, layers: list[str], sites: list[str]) -> None:
    """Name the matrix node of each layer and the QuantizeLinear of each site by module path."""
    values = model.graph.initializers
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and node.inputs[1] is not None:
            node.name = str(node.inputs[1].name).removesuffix(".scale")
    for path in layers:
        for name in weight_names(path):
            if name in values:
                _name_reader(values[name], path)
    known = {*layers, *sites}
    for node in model.graph:
        if node.name not in known:
            node.name = None


def _name_reader(weight: ir.Value, path: str) -> None:
    """Walk from a weight through its decoding to the matrix node that reads it."""
    front = [weight]
    while front:
        for node, _ in front.pop().uses():
            if node.op_type in LAYER_OPS:
                node.name = path
            else:
                front.extend(node.outputs)


def _should_fold(node: ir.Node) -> bool | None:
    """Decoding of stored weights must stay in the graph: the runtime folds it, not the file."""
    stored = any(v is not None and v.is_initializer() for v in node.inputs)
    return False if node.op_type in _KEEP and stored else None
