"""torchvision, imported in a way that also works beside a CPU-only torch.

torchvision's wheel from the default package index is built against CUDA. Beside a CPU-only torch
its binary library does not load, and the import then fails with `operator torchvision::nms does
not exist`, because it describes two detection operators that only the library would define. Here
the two schemas are declared before the import, if the library has not declared them. They get no
kernels: classifiers and image transforms call neither.

Every use of torchvision in this package goes through `models` and `transforms`. The import takes a
second or more, so it waits until the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def models() -> ModuleType:
    """The module `torchvision.models`."""
    declare_missing()
    return importlib.import_module("torchvision.models")


def transforms() -> ModuleType:
    """The module `torchvision.transforms.v2`."""
    declare_missing()
    return importlib.import_module("torchvision.transforms.v2")


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
