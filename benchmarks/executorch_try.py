"""ResNet-20 as a .pte for XNNPACK by PT2E: answers, delegated layers, bytes, speed.

`python benchmarks/executorch_try.py RUN` in an environment with `executorch` beside mpq. The float
checkpoint of CIFAR-10 is quantized by PT2E's XNNPACKQuantizer (8 bits, per channel, 256 training
images), lowered, and held against its own simulation and against float.onnx of RUN on 512 test
images. It prints one row of `rows/other_runtimes.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import executorch
import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from mpq.checkpoint import load_model
from mpq.data import Normalization, open_data, sample_indices
from mpq.export import runtime

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
TRAIN, TEST, RUNS = 256, 512, 40


def lowered(module: torch.nn.Module) -> tuple[bytes, int, dict[str, int]]:
    """The file of a module, delegated calls, and what is left outside of them."""
    example = (torch.zeros(1, 3, 32, 32),)
    program = torch.export.export(module, example)
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    ops = Counter(str(n.target) for n in edge.exported_program().graph.nodes
                  if n.op == "call_function")  # fmt: skip
    calls = sum(count for op, count in ops.items() if "delegate" in op)
    rest = {op: n for op, n in ops.items() if "delegate" not in op and "getitem" not in op}
    return edge.to_executorch().buffer, calls, rest


def run(data: bytes, images: torch.Tensor) -> tuple[np.ndarray, float]:
    """Logits of each image alone, and median CPU milliseconds of a run."""
    method = Runtime.get().load_program(data).load_method("forward")
    found, times = [], []
    for image in images:
        begun = time.process_time()
        (answer,) = method.execute([image[None]])
        times.append(1e3 * (time.process_time() - begun))
        found.append(answer.numpy().copy())
    return np.concatenate(found), float(np.median(times[-RUNS:]))


def main() -> None:
    """Quantize, lower, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    plain = runtime.session(parser.parse_args().run / "float.onnx")
    torch.set_num_threads(1)
    data, norm = open_data("cifar10", root=DATA), Normalization.parse("imagenet")
    seen = norm.apply(data.train.read(sample_indices(data.train, TRAIN, 0)))
    chosen = sample_indices(data.compared, TEST, 0)
    images = torch.from_numpy(norm.apply(data.compared.read(chosen)))
    labels = np.asarray(data.compared.labels)[chosen]
    net = load_model(DATA / "checkpoints" / "resnet20-cifar10.pth").module.eval()
    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    graph = torch.export.export(net, (torch.zeros(1, 3, 32, 32),)).module()
    prepared = prepare_pt2e(graph, quantizer)
    for image in torch.from_numpy(seen):
        prepared(image[None])
    converted = convert_pt2e(prepared)
    simulated = np.concatenate([converted(x[None]).detach().numpy() for x in images])
    pte, calls, rest = lowered(converted)
    answer, ms = run(pte, images)
    float_pte, *_ = lowered(net)
    _, float_ms = run(float_pte, images[: 2 * RUNS])
    wanted = runtime.run(plain, images.numpy())
    print(json.dumps({
        "runtime": f"executorch {executorch.__version__}" if hasattr(executorch, "__version__")
        else "executorch", "bytes": len(pte), "float_bytes": len(float_pte), "n": TEST,
        "bit_equal_simulation": int((answer == simulated).all(1).sum()),
        "same_class_simulation": int((answer.argmax(1) == simulated.argmax(1)).sum()),
        "same_class_float": int((answer.argmax(1) == wanted.argmax(1)).sum()),
        "top1": round(100 * float((answer.argmax(1) == labels).mean()), 2),
        "float_top1": round(100 * float((wanted.argmax(1) == labels).mean()), 2),
        "delegates": calls, "outside": rest, "ms": round(ms, 3),
        "ratio": round(float_ms / ms, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
