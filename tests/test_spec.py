from __future__ import annotations

import pytest

from mpq.spec import WIDTHS, QuantSpec, activation_spec, weight_spec

SPECS = [
    QuantSpec(bits, signed, granularity)
    for bits in WIDTHS
    for signed in (True, False)
    for granularity in ("tensor", "channel")
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_parse_and_str_are_inverses(spec: QuantSpec):
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("text", ["int4/channel", "uint8/tensor", "int16/tensor", "uint2/channel"])
def test_str_gives_the_text_that_was_parsed(text: str):
    assert str(QuantSpec.parse(f" {text}\n")) == text


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_range_has_two_to_the_bits_integers(spec: QuantSpec):
    assert spec.qmax - spec.qmin + 1 == 2**spec.bits
    assert spec.qmin == (-(2 ** (spec.bits - 1)) if spec.signed else 0)
    assert spec.symmetric is spec.signed


@pytest.mark.parametrize(
    "text", ["int4", "4/channel", "int4/row", "INT4/channel", "int4/tensor/", ""]
)
def test_parse_refuses_other_forms(text: str):
    with pytest.raises(ValueError, match=r"must look like 'int4/channel'.*Got '"):
        QuantSpec.parse(text)


@pytest.mark.parametrize("bits", [0, 1, 9, 32])
def test_unknown_width(bits: int):
    with pytest.raises(ValueError, match=rf"bits must be one of .* Got {bits} instead"):
        QuantSpec(bits, True, "tensor")
    with pytest.raises(ValueError, match=rf"bits must be one of .* Got {bits} instead"):
        QuantSpec.parse(f"int{bits}/tensor")


def test_unknown_granularity():
    with pytest.raises(
        ValueError, match=r"must be 'tensor' or 'channel', or 'dynamic' for uint8. Got 'group'"
    ):
        QuantSpec(8, True, "group")  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", WIDTHS)
def test_usual_formats(bits: int):
    assert str(weight_spec(bits)) == f"int{bits}/channel"
    assert str(activation_spec(bits)) == ("int16/tensor" if bits == 16 else f"uint{bits}/tensor")
