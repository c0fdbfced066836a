"""Three-way verification: the simulation, onnxruntime unoptimized, onnxruntime at its defaults.

End to end on all given images (does the class agree?) and site by site on some of them (how many
integers differ, and by how many steps?). A site that differs by one step passes that difference on,
so the steps of deep sites are those of everything before them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.errors import ExportError
from mpq.graph.ir import QuantGraph
from mpq.numerics import sqnr_db
from mpq.quant.fake_quant import FrozenQuant

from . import runtime
from .pixels import PixelInput

LAYER_IMAGES = 32
"""Images for the comparison site by site: integer tensors of all sites are held at once."""
MIN_AGREEMENT = 0.99
"""Least share of images on which class of simulation and of runtime must agree."""
MIN_SQNR_DB = 15.0
"""Least SQNR of any site and of the logits. A broken layer is near or below 0 dB."""


@dataclass(frozen=True, slots=True)
class SiteCheck:
    """One quantizer: SQNR in dB, largest difference in steps, share of equal integers."""

    name: str
    sqnr_db: float
    max_step: int
    equal_fraction: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """How the exported file answers, against the simulation.

    Args:
        n: images.
        top1_agreement: share of images with the same class, default options.
        top1_agreement_unoptimized: the same with optimizations off.
        logits_sqnr_db: of the logits, default options.
        max_step: largest difference of any site.
        layers: one row per site.
    """

    n: int
    top1_agreement: float
    top1_agreement_unoptimized: float
    logits_sqnr_db: float
    max_step: int
    layers: tuple[SiteCheck, ...]

    def failures(self) -> list[str]:
        """Bounds that are not met, in words."""
        found = []
        # One image may always differ: with few images a single tie must not fail the file.
        least = min(MIN_AGREEMENT, 1 - 1.5 / self.n)
        for name in ("top1_agreement", "top1_agreement_unoptimized"):
            value = getattr(self, name)
            if not value >= least:
                found.append(f"{name} is {value:.4f}, must be at least {least:.4f}")
        ratios = {"logits": self.logits_sqnr_db} | {r.name: r.sqnr_db for r in self.layers}
        for name, ratio in ratios.items():
            if not ratio >= MIN_SQNR_DB:  # a NaN fails too
                found.append(f"{name}: SQNR is {ratio:.1f} dB, must be at least {MIN_SQNR_DB}")
        return found

    def to_json(self) -> str:
        """The contents of `verify.json`."""
        data = asdict(self)
        for row in data["layers"]:
            row["sqnr_db"] = min(row["sqnr_db"], 999.0)  # JSON has no infinity
        data["logits_sqnr_db"] = min(data["logits_sqnr_db"], 999.0)
        return json.dumps(data, indent=1)


@torch.no_grad()
def verify(
    qg: QuantGraph,
    model: bytes,
    sites: dict[str, str],
    images: Tensor,
    *,
    batch: int = 250,
    pixels: PixelInput | None = None,
) -> VerifyReport:
    """Compare a frozen graph with its exported file.

    Args:
        qg: the graph in stage `frozen` (or `float`, for a float file).
        model: bytes of the file.
        sites: site name -> name of the value that holds its integers.
        images: normalized `[N, C, H, W]`.
        batch: images at a time.
        pixels: the file takes raw images, of which `images` were made.

    Raises:
        ExportError: the runtime cannot load or run the file, or there are no images.
    """
    if len(images) == 0:
        raise ExportError("verification needs at least one image.")
    qg.module.eval()
    feed: NDArray[Any] = images.numpy()
    if pixels is not None:
        feed = pixels.pixels(feed)
        images = torch.from_numpy(pixels.normalize.apply(feed))
        feed = feed if pixels.channels_last else feed.transpose(0, 3, 1, 2)
    parts = torch.split(images, batch)
    simulated = torch.cat([qg.module(part) for part in parts]).flatten(1)
    default, plain = (
        torch.from_numpy(runtime.run(runtime.session(model, optimize=on), feed, batch=batch))
        for on in (True, False)
    )
    few = slice(0, LAYER_IMAGES)
    rows = _check_sites(qg, model, sites, images[few], np.ascontiguousarray(feed[few]))
    classes = simulated.argmax(1)
    return VerifyReport(
        n=len(images),
        top1_agreement=float((default.argmax(1) == classes).double().mean()),
        top1_agreement_unoptimized=float((plain.argmax(1) == classes).double().mean()),
        logits_sqnr_db=sqnr_db(simulated, default),
        max_step=max((r.max_step for r in rows), default=0),
        layers=rows,
    )


def _check_sites(
    qg: QuantGraph, model: bytes, sites: dict[str, str], images: Tensor, feed: NDArray[Any]
) -> tuple[SiteCheck, ...]:
    if not sites:
        return ()
    proto = onnx.load_from_string(model)
    for name in sites.values():
        proto.graph.output.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None)
        )
    values = runtime.values(proto.SerializeToString(), feed, list(sites.values()))
    simulated, blocked = _integers(qg, list(sites), images), _blocked(proto.graph)
    return tuple(
        _compare(
            site,
            _in_blocks(simulated[site]) if value in blocked else simulated[site],
            torch.from_numpy(values[value]),
            _zero_point(qg, site),
        )
        for site, value in sites.items()
        if site in simulated  # what runs only under a condition did not run
    )


def _blocked(graph: onnx.GraphProto) -> set[str]:
    """Values that hold the pixels of an image in 2x2 blocks (see `stem.py`)."""
    found: set[str] = set()
    for node in graph.node:  # in the order of execution
        after = node.op_type in ("QuantizeLinear", "Clip") and node.input[0] in found
        if node.op_type == "SpaceToDepth" or after:
            found.update(node.output)
    return found


def _in_blocks(x: Tensor) -> Tensor:
    """What SpaceToDepth of 2x2 blocks makes of `[N, C, H, W]`."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, 4 * c, h // 2, w // 2)


def _integers(qg: QuantGraph, sites: list[str], images: Tensor) -> dict[str, Tensor]:
    """The integers of each quantizer in the simulation, islands included."""
    found: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            assert isinstance(module, FrozenQuant)
            found[site] = (torch.round(out / module.scale) + module.zero_point).to(torch.uint8)

        return hook

    handles = [qg.module.get_submodule(s).register_forward_hook(keep(s)) for s in sites]
    try:
        qg.module(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _zero_point(qg: QuantGraph, site: str) -> float:
    quantizer = qg.module.get_submodule(site)
    assert isinstance(quantizer, FrozenQuant)
    return float(quantizer.zero_point)


def _compare(site: str, expected: Tensor, got: Tensor, zero_point: float) -> SiteCheck:
    want, have = expected.float(), got.reshape(expected.shape).float()
    step = (want - have).abs()
    return SiteCheck(
        site.removeprefix("quantizers."),
        sqnr_db(want - zero_point, have - zero_point),
        int(step.max()),
        float((step == 0).double().mean()),
    )
