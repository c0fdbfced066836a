"""Values of a policy that stand in it as text: number formats, and what a network takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from mpq.inputs import InputSpec
from mpq.spec import WIDTHS, QuantSpec

Float = Literal["float"]


def _read_spec(value: object) -> object:
    known = value == "float" or isinstance(value, QuantSpec)
    return value if known else QuantSpec.parse(str(value))


def _read_input(value: object) -> object:
    return value if isinstance(value, InputSpec) else InputSpec.parse(str(value))


_TEXT = f"^(float|uint8/dynamic|u?int({'|'.join(map(str, WIDTHS))})/(channel|tensor))$"
_Schema = WithJsonSchema({"type": "string", "pattern": _TEXT})
Spec = Annotated[QuantSpec | Float, BeforeValidator(_read_spec), PlainSerializer(str), _Schema]
"""A number format (`int4/channel`) or `float`."""
_Sizes = WithJsonSchema({"type": "string", "pattern": r"^[0-9, ]*(: ?[a-z0-9]+)?$"})
Input = Annotated[InputSpec, BeforeValidator(_read_input), PlainSerializer(str), _Sizes]
"""An input of a network, without the batch: `3,224,224` or `77:int64`."""
