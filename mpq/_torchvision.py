"""torchvision, imported in a way that also works beside a CPU-only torch.

torchvision's wheel from the default package index is built against CUDA. Beside a CPU-only torch
its binary library does not load, and the import then fails with `operator torchvision::nms does
not exist`, because it describes two detection operators that only the library would define. Here
the two schemas are declared before the import, if the library has not declared them. They get no
kernels: classifiers and image transforms call neither.

Every use of torchvision in this package goes through `models` and `transforms`. The import waits
until the first call, and leaves out torch's compiler: `torchvision.ops` imports it to ask for one
function, and that alone takes six times as long as the rest (1.2 of 1.4 seconds).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_COMPILER, _ASKED = ("torch._dynamo", "torch._dynamo.utils"), "is_compile_supported"


def models() -> ModuleType:
    """The module `torchvision.models`."""
    return _imported("torchvision.models")


def transforms() -> ModuleType:
    """The module `torchvision.transforms.v2`."""
    return _imported("torchvision.transforms.v2")


def tv_tensors() -> ModuleType:
    """The module `torchvision.tv_tensors`: tensors of which a transform knows what they are."""
    return _imported("torchvision.tv_tensors")


def _imported(name: str) -> ModuleType:
    declare_missing()
    if not any(part in sys.modules for part in _COMPILER):
        sys.modules.update({part: _Later(part) for part in _COMPILER})
    try:
        return importlib.import_module(name)
    finally:
        _withdraw()


class _Later(ModuleType):
    """Stands in for a part of torch's compiler until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def found() -> Any:
            _withdraw()
            return getattr(importlib.import_module(self.__name__), name)

        return (lambda *args: found()(*args)) if name == _ASKED else found()


def _withdraw() -> None:
    for name in _COMPILER:
        if isinstance(sys.modules.get(name), _Later):
            del sys.modules[name]


@functools.cache
def declare_missing() -> torch.library.Library | None:
    """Declare the operators that torchvision's own library does not bring.

    The cache keeps the returned handle alive: with the handle the schemas would go.
    """
    load_library()
    missing = [s for n, s in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, n)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    return library


def load_library() -> None:
    """Load torchvision's own library where it can be; a schema declared twice would be an error."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations if spec else None) or []:
        for path in sorted(Path(folder).glob("_C*.so")) + sorted(Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(path))
            except OSError:  # it asks for a CUDA library that is not here
                continue
