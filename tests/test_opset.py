"""A model is written in another opset, or refused with what that opset lacks."""

from __future__ import annotations

import numpy as np
import pytest
from onnxtext import answer, parse

from mpq.errors import ExportError
from mpq.export.form import Form
from mpq.export.opset import set_opset

OLD = Form(int4="unpack", opset=18, ir=8)


def test_what_both_opsets_have_is_kept():
    model = parse("(float[2] x) => (float[2] y) { y = Clip(x, low) }", low=np.float32(0))
    before = answer(model, x=np.float32([-1, 1]))
    set_opset(model, OLD)
    assert (model.opset_imports[""], model.ir_version) == (18, 8)
    assert np.array_equal(answer(model, x=np.float32([-1, 1])), before)


@pytest.mark.parametrize(
    ("node", "lacks"),
    [
        ("Gelu(x)", "Gelu,"),
        ('Gelu<approximate="tanh">(x)', "Gelu with approximate=tanh,"),
        ("QuantizeLinear<output_dtype=2>(x, s)", "QuantizeLinear with output_dtype=2,"),
    ],
)
def test_what_an_opset_lacks_is_named(node: str, lacks: str):
    model = parse(f"(float[2] x) => (float[2] y) {{ y = {node} }}", s=np.float32(1))
    with pytest.raises(ExportError, match=f"opset 18 has no {lacks} which this network needs"):
        set_opset(model, OLD)
    assert model.opset_imports[""] == 21


def test_operators_of_other_domains_are_not_judged():
    model = parse("(float[2] x) => (float[2] y) { y = com.microsoft.QuickGelu(x) }")
    set_opset(model, OLD)
    assert model.opset_imports[""] == 18
