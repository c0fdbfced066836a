from __future__ import annotations

import pytest

from mpq.errors import PolicyError
from mpq.spec import WIDTHS
from mpq.target import ONNXRUNTIME_CPU, Target, get_target


@pytest.mark.parametrize("weight", [*WIDTHS, None])
@pytest.mark.parametrize("activation", [*WIDTHS, None])
def test_integer_kernels_exist_for_eight_bits_and_fewer(weight: int | None, activation: int | None):
    support = get_target("onnxruntime-cpu").support(weight, activation)
    integer = weight in (2, 3, 4, 5, 6, 8) and activation in (2, 3, 4, 5, 6, 8)
    assert support.integer is integer
    assert support.compute == ("int8" if integer else "float")
    assert support.storage == ("float" if weight is None else f"int{weight}")
    assert bool(support.reason) is not integer


def test_unknown_target_names_the_nearest():
    with pytest.raises(PolicyError, match="Got 'onnxruntime-gpu'; did you mean onnxruntime-cpu"):
        get_target("onnxruntime-gpu")


def test_a_width_that_a_target_lacks():
    bare = Target("bare", {(8, 8): ONNXRUNTIME_CPU.support(8, 8)}, frozenset(), frozenset())
    with pytest.raises(PolicyError, match=r"target bare has no W4A32 layer. It has W8A8"):
        bare.support(4, None)


def test_an_operation_is_computed_or_moved_not_both():
    assert not ONNXRUNTIME_CPU.integer_ops & ONNXRUNTIME_CPU.moving_ops
