"""What `--input uint8` costs: one network as a file of normalized images and as files of raw ones.

    python benchmarks/pixels.py [--model resnet18] [--rounds 60]

W8A8 with random weights, one thread, batch 1, interleaved. Milliseconds are CPU time of the thread,
medians over the rounds; `numpy` is what the file of raw images saves outside of the runtime.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mpq import _torchvision
from mpq.data import Normalization
from mpq.export import runtime, to_onnx
from mpq.export.bench import interleave
from mpq.export.pixels import PixelInput
from mpq.graph.passes import prepare
from mpq.policy import Policy
from mpq.ptq import calibrate

HOW = Normalization.parse("imagenet")
INPUTS = {
    "normalized": None,
    "uint8 NCHW": PixelInput(HOW),
    "uint8 NHWC": PixelInput(HOW, channels_last=True),
}


def main() -> None:
    """Read the options, write the files, and let them take turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), np.uint8)
    images = torch.from_numpy(HOW.apply(pixels))
    net = _torchvision.models().get_model(args.model, weights=None).eval()
    graph = prepare(net, Policy(), images[:2])
    calibrate(graph, images, method="minmax", batch=2)
    runners, certificates = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, taken in INPUTS.items():
            made = to_onnx(graph, Path(folder) / f"{name}.onnx", pixels=taken)
            certificates.append(made.certificate)
            loaded = runtime.session(made.path)
            feed = images[:1].numpy() if taken is None else pixels[:1]
            if taken is not None and not taken.channels_last:
                feed = np.ascontiguousarray(feed.transpose(0, 3, 1, 2))
            named = {loaded.get_inputs()[0].name: feed}
            runners.append(lambda loaded=loaded, named=named: loaded.run(None, named))
    runners.append(lambda: HOW.apply(pixels[:1]))
    times = interleave(runners, runs=args.rounds, clock=time.thread_time)
    print(f"{args.model}, onnxruntime {runtime.version()}, {args.rounds} rounds")
    for name, told, row in zip(INPUTS, certificates, times, strict=False):
        ratio = np.median(row / times[0])
        print(
            f"{name}: {1000 * np.median(row):.3f} ms, {ratio:.3f} of that of normalized images, "
            f"{told.integer_macs_fraction:.2%} integer, {told.boundaries} boundaries"
        )
    print(f"numpy: {1000 * np.median(times[-1]):.3f} ms")


if __name__ == "__main__":
    main()
