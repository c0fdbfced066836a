"""ONNX operators by what they do to values. Nothing is imported here: `certify` needs no torch."""

from __future__ import annotations

MOVES = frozenset({
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "DepthToSpace"),
    *("Slice", "Split", "Gather", "Pad", "MaxPool"),
})  # fmt: skip
"""What only moves or selects values, so that it does the same to integers and to the floats that
they stand for: `Target.moving_ops` in the words of ONNX."""
LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger"})
"""What a layer's matrix node can be; its weights are the second input."""
