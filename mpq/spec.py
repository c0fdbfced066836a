"""`QuantSpec`: the number format of a tensor, as a value with a text form.

`int4/channel` is signed and symmetric with one scale per output channel, `uint8/tensor` unsigned
and affine (it has a zero point) with one scale; `uint8/dynamic` is the same with scale and zero
point taken from each tensor as it comes, at run time. `parse` and `str` are inverses but for
`reduced`, which has no text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Granularity = Literal["tensor", "channel", "dynamic"]
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
"""The widths of mpq, in bits: the one list of them."""
_TEXT = re.compile(r"(u?)int(\d+)/(tensor|channel|dynamic)")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Number format of a quantized tensor.

    Args:
        bits: width, one of `WIDTHS`.
        signed: two's complement, symmetric around zero; otherwise unsigned with a zero point.
        granularity: one scale for the tensor or one per output channel; or one for the tensor that
            is chosen at run time, of which runtimes know only the unsigned 8-bit form.
        reduced: only half of the range is used, for the sake of a target (`mpq.target`); no part of
            the text form, because no policy asks for it.

    Raises:
        ValueError: a width or granularity that mpq does not know.
    """

    bits: int
    signed: bool
    granularity: Granularity
    reduced: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits must be one of {WIDTHS}. Got {self.bits} instead.")
        if self.granularity not in get_args(Granularity):
            raise ValueError(
                "granularity must be 'tensor' or 'channel', or 'dynamic' for uint8. "
                f"Got {self.granularity!r} instead."
            )
        if self.granularity == "dynamic" and (self.signed or self.bits != 8):
            raise ValueError(
                f"a range that is chosen at run time needs uint8/dynamic. Got {self} instead."
            )

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read the text form, e.g. `int4/channel`.

        Raises:
            ValueError: text of another form.
        """
        match = _TEXT.fullmatch(text.strip())
        if not match:
            raise ValueError(
                f"a number format must look like 'int4/channel' or 'uint8/tensor'. "
                f"Got {text!r} instead."
            )
        unsigned, bits, granularity = match.groups()
        return cls(int(bits), not unsigned, granularity)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}/{self.granularity}"

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is always 0: true for every signed format."""
        return self.signed

    @property
    def qmin(self) -> int:
        """Lowest integer."""
        return -(1 << (self.bits - 1 - self.reduced)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Highest integer."""
        return (1 << (self.bits - self.signed - self.reduced)) - 1


def weight_spec(bits: int) -> QuantSpec:
    """The weight format at a width: signed, per output channel."""
    return QuantSpec(bits, True, "channel")


def activation_spec(bits: int) -> QuantSpec:
    """The activation format at a width: unsigned and affine up to 8 bits, signed at 16.

    At 16 bits it is that of the form `fast`, which rounds nothing (`ROUNDED_16` does).
    """
    return QuantSpec(bits, bits > 8, "tensor")


DYNAMIC = QuantSpec(8, False, "dynamic")
"""The activation format whose range is that of each tensor as it comes."""

ROUNDED_16 = QuantSpec(16, False, "tensor")
"""The activation format of 16-bit layers in the form `exact`: rounded at run time, as 8 bits are.

`int16/tensor` is the form `fast`: a layer of float arithmetic reads the tensor as it is."""
