"""The picture of the README: accuracy over bytes of the file, from results that were kept.

    python benchmarks/front.py          writes docs/front.svg

Points are rows of `benchmarks/study` in results/cifar10-resnet20/rows.csv (float, mpq at every
width, without training) and onnxruntime's own int8 in peers.csv there, which benchmarks/resnet20.py
measured on the same 10,000 test images. Bars are 95 % intervals (Wilson) of so many images.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from mpq.report.plots import clean

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cifar10-resnet20"
SHOWN = {
    "public-float": ("float", 6, 5),
    "public-w8a8": ("mpq 8 bits", -104, 6),
    "public-16-8": ("mpq 16/8 bits", 6, 8),
    "public-8-4": ("mpq 8/4 bits", 6, 4),
    "public-w4a8": ("mpq 4 bits", 6, -12),
    "ort-static": ("onnxruntime static int8", 8, -6),
    "ort-dynamic": ("onnxruntime dynamic int8", 16, -24),
}
"""Row, its name in the picture, and where that stands beside its point."""
COLOURS = {"public": "#0072B2", "ort": "#D55E00", "float": "#333333"}


def rows() -> list[dict[str, str]]:
    """What was measured, those shown."""
    found: list[dict[str, str]] = []
    for name in ("rows.csv", "peers.csv"):
        with (RESULTS / name).open(encoding="utf-8", newline="") as file:
            found += [row for row in csv.DictReader(file) if row["row"] in SHOWN]
    return found


def interval(percent: float, images: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, in percent."""
    p, n = percent / 100, images
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (middle - half) / (1 + z * z / n), 100 * (middle + half) / (1 + z * z / n)


def front() -> Figure:
    """The picture."""
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axis = figure.subplots()
    for row in rows():
        name, dx, dy = SHOWN[row["row"]]
        colour = COLOURS["float" if name == "float" else row["row"].partition("-")[0]]
        at, top1 = int(row["bytes"]) / 1e3, float(row["test_top1"])
        low, high = interval(top1, int(row["test_images"]))
        axis.errorbar(at, top1, [[top1 - low], [high - top1]], fmt="o", color=colour, ms=7, lw=0.8)
        axis.annotate(f"{name}, {at:,.0f} kB", (at, top1), xytext=(dx, dy), color=colour,
                      textcoords="offset points", fontsize=9)  # fmt: skip
        if name == "float":
            axis.axhline(top1, color=colour, lw=0.8, ls=":", zorder=0)
    axis.set_xscale("log")
    axis.set_xticks([150, 200, 300, 500, 1000], ["150", "200", "300", "500", "1,000"])
    axis.minorticks_off()
    axis.set_xlim(130, 1600)
    axis.set_xlabel("bytes of the ONNX file, kB")
    axis.set_ylabel("top-1 of 10,000 test images, percent")
    axis.set_title("ResNet-20 on CIFAR-10, quantized without training", fontsize=11, loc="left")
    clean(axis)
    return figure


def main() -> None:
    """Write the picture."""
    mpl.rcParams["svg.hashsalt"] = "mpq"  # the same bytes each time
    front().savefig(HERE.parent / "docs" / "front.svg", format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
