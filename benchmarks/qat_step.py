"""What a training step costs: float, prepared by mpq, by torch's own quantization, by Brevitas.

One interleaved run: in each round every variant makes one step (forward, backward, SGD) on the same
images, so that a machine that slows down slows all of them. Times are CPU seconds of the process,
in milliseconds; ratios are medians over the rounds of variant / float, `of_compiled` of variant /
compiled float (with `--compile`, which adds a compiled row for float and for mpq). What mpq runs is
what `mpq qat` runs. Memory is the peak of one eager step over what lay there before, measured in a
process of its own; `--no-memory` leaves it out. Brevitas has a row where it is installed; its
scales are calibrated first, as the steps that collect statistics cost more than all later ones.
`--variants` takes a choice of the rows: fewer networks share the memory of the process then.
`--bf16` takes mpq's autocast, and has a row for torch's, which leaves no layer in float32.

    python benchmarks/qat_step.py [--models resnet18_cifar] [--batch 128] [--rounds 10] [--compile]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from common import setting
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from mpq import attach_norms, policies, prepare, quantize_graph, to_float, zoo
from mpq.allocator import keep_freed
from mpq.export.runtime import peak_memory_mb
from mpq.graph.redundant import drop_redundant_relus
from mpq.train.bf16 import autocast
from mpq.train.compiled import compiled

Batch = tuple[Tensor, Tensor]
MODELS = ("resnet18_cifar", "mobilenet_v2_cifar")
VARIANTS = ("float", "mpq w8a8", "mpq w4a8", "torch fx w8a8")
BREVITAS = ("brevitas w8a8",) if importlib.util.find_spec("brevitas") else ()
TORCH_BF16 = "float, torch's autocast"
COMPILED = ("float compiled", "mpq w8a8 compiled", "mpq w4a8 compiled")


def network(name: str, variant: str) -> nn.Module:
    """A network with random weights, ready to train, channels last."""
    torch.manual_seed(0)
    model = zoo.build(name, 10)
    images = torch.randn(16, 3, 32, 32)
    if variant.startswith("mpq"):
        graph = prepare(to_float(model.eval(), images[:2]), policies.load(variant.split()[1]))
        quantize_graph(graph, images, effort="fast")
        attach_norms(graph, images)
        model = drop_redundant_relus(graph.module)
    elif variant.startswith("torch"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapping = get_default_qat_qconfig_mapping("onednn")
            model = prepare_qat_fx(model.train(), mapping, (images[:2],))
    elif variant.startswith("brevitas"):
        model = by_brevitas(model.eval(), images)
    made: nn.Module = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return compiled(made, "cpu") if variant.endswith("compiled") else made


def by_brevitas(model: nn.Module, images: Tensor) -> nn.Module:
    """As Brevitas quantizes a network for training, batch norm alive, scales calibrated."""
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    made: nn.Module = quantize(preprocess_for_quantize(model, merge_bn=False))
    with torch.no_grad(), calibration_mode(made):
        made(images)
    return made


def stepper(variant: str, model: nn.Module, batch: Batch, *, bf16: bool) -> Callable[[], None]:
    """One optimizer step."""
    images, labels = batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        by_torch = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with by_torch if variant == TORCH_BF16 else autocast("cpu", enabled=bf16):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def batch_of(size: int) -> Batch:
    """Random images, channels last, and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (size,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def memory(name: str, variant: str, options: argparse.Namespace) -> float:
    """Peak of two steps in MB over the resting process, from a process of its own."""
    command = [sys.executable, __file__, "--models", name, "--memory", variant]
    command += ["--batch", str(options.batch), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak_of(name: str, variant: str, options: argparse.Namespace) -> float:
    """What `memory` runs."""
    step = stepper(variant, network(name, variant), batch_of(options.batch), bf16=options.bf16)
    before = peak_memory_mb()
    step()
    step()
    return peak_memory_mb() - before


def measure(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """A row per variant."""
    steps, batch = {}, batch_of(options.batch)
    more = BREVITAS + COMPILED * options.compile + (TORCH_BF16,) * options.bf16
    for variant in options.variants or VARIANTS + more:
        step = stepper(variant, network(name, variant), batch, bf16=options.bf16)
        try:
            step()
        except TypeError as error:  # as Brevitas on slices, of shortcuts without parameters
            if variant not in BREVITAS:
                raise
            print(f"{name}, {variant}: {error}", file=sys.stderr)
            continue
        step()
        steps[variant] = step
    times: dict[str, list[float]] = {v: [] for v in steps}
    for _ in range(options.rounds):
        for variant, step in steps.items():
            start = time.process_time()
            step()
            times[variant].append(1e3 * (time.process_time() - start))
    return [row(name, variant, times, options) for variant in times]


def row(
    name: str, variant: str, times: dict[str, list[float]], options: argparse.Namespace
) -> dict[str, object]:
    """What a variant costs, beside the float step of the same round."""
    ratio = np.array(times[variant]) / np.array(times["float"])
    found: dict[str, object] = {
        "model": name,
        "variant": variant,
        "ms": round(float(np.median(times[variant])), 1),
        "ratio": round(float(np.median(ratio)), 2),
        "p10": round(float(np.quantile(ratio, 0.1)), 2),
        "p90": round(float(np.quantile(ratio, 0.9)), 2),
    }
    if "float compiled" in times:
        against = np.array(times[variant]) / np.array(times["float compiled"])
        found["of_compiled"] = round(float(np.median(against)), 2)
    if options.memory_rows and not variant.endswith("compiled"):
        found["peak_mb"] = round(memory(name, variant, options))
    return found


def main() -> None:
    """Measure and print a JSON line per variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-memory", dest="memory_rows", action="store_false")
    parser.add_argument(
        "--variants", nargs="+", choices=(*VARIANTS, *BREVITAS, *COMPILED, TORCH_BF16)
    )
    parser.add_argument("--memory", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variants and "float" not in options.variants:
        parser.error("--variants must have float, to which all is compared")
    torch.set_num_threads(options.threads)
    keep_freed()
    if options.memory:
        print(peak_of(options.models[0], options.memory, options))
        return
    for name in options.models:
        for row in measure(name, options):
            print(json.dumps(row), flush=True)
    chosen = {"batch": options.batch, "threads": options.threads, "bf16": options.bf16}
    print(json.dumps(setting() | chosen | {"compile": options.compile}))


if __name__ == "__main__":
    main()
