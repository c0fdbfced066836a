"""torchvision beside a CPU-only torch. Imports are tried in fresh processes: they leave traces."""

from __future__ import annotations

import subprocess
import sys

import torch

from mpq import _torchvision


def _python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_models_work():
    models = _torchvision.models()
    assert "mobilenet_v3_small" in models.list_models(module=models)


def test_schemas_exist_afterwards_and_are_declared_once():
    _torchvision.models()
    for name in ("nms", "qnms"):
        assert hasattr(torch.ops.torchvision, name)
    assert _torchvision.declare_missing() is _torchvision.declare_missing()


def test_nothing_is_declared_where_the_operators_exist():
    code = """
import torch
from mpq import _torchvision
_torchvision.load_library()
if not hasattr(torch.ops.torchvision, "nms"):  # else the library itself has brought them
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
assert _torchvision.declare_missing() is None
assert _torchvision.models().resnet18
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr


def test_importing_the_zoo_does_not_import_torchvision():
    result = _python("import sys, mpq.zoo, mpq.checkpoint; assert 'torchvision' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_torchs_compiler_waits_until_it_is_asked():
    code = """
import sys, torch
from mpq import _torchvision
assert _torchvision.models().resnet18
assert not {"torch._dynamo", "torch._dynamo.utils", "sympy"} & set(sys.modules)
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu") in (True, False)
assert torch._dynamo.utils.__file__ and sys.modules["torch._dynamo"].__file__
"""
    result = _python(code)
    assert result.returncode == 0, result.stderr
