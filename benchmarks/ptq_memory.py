"""Peak memory of `quantize_graph` on a network at 224 pixels, with and without room for everything.

    python benchmarks/ptq_memory.py --arch mobilenet_v2 --images 64 --memory-mb 128

Weights and images are random: neither time nor memory depends on them. One budget a process, since
the high water mark of a process never falls.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from common import setting

from mpq import zoo
from mpq.graph.passes import prepare, to_float
from mpq.policy import Policy
from mpq.ptq import EFFORTS, MEMORY_MB, quantize_graph


def peak_mb() -> float:
    """High water mark of this process, 10^6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Quantize and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="mobilenet_v2")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--memory-mb", type=float, default=MEMORY_MB)
    parser.add_argument("--effort", choices=EFFORTS, default="good")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = zoo.build(options.arch, 1000).eval()
    images = torch.randn(options.images, *zoo.input_size(options.arch))
    graph = prepare(to_float(model, images[:1]), Policy.uniform(4, 8))
    before, start = peak_mb(), time.process_time()
    quantize_graph(graph, images, effort=options.effort, memory_mb=options.memory_mb)
    row = {
        "arch": options.arch,
        "images": options.images,
        "memory_mb": options.memory_mb,
        "batch": graph.batch(),
        "peak_mb": round(peak_mb()),
        "before_mb": round(before),
        "cpu_s": round(time.process_time() - start),
    }
    print(json.dumps(row | setting()))


if __name__ == "__main__":
    main()
