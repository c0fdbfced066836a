"""The verbs of the command line as functions: the same names, options, defaults and results.

    import mpq

    found = mpq.analyze(model, loader, budget=4.8)       # a network, and data as PyTorch has them
    quantized = mpq.ptq(model, loader, found)            # or mpq.qat(..., teacher=large)
    mpq.export(quantized, "model.onnx")                  # verified and certified

A model is any `nn.Module`, or the path of a checkpoint. Data are a `DataLoader`, a `Dataset`, an
iterable of batches, a tensor, or a name as `--data` takes it (`mpq.pipeline.given`). Results print
themselves, show tables in a notebook, and are kept by `save` and `load`. Nothing is written unless
a path is named.
"""

from __future__ import annotations

from mpq.api.files import bench, certify, diagnose, export, report, verify
from mpq.api.networks import analyze, ptq, qat

__all__ = ["analyze", "bench", "certify", "diagnose", "export", "ptq", "qat", "report", "verify"]
