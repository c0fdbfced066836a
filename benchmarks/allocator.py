"""What it saves to keep freed memory (`mpq.allocator`): CPU time, page faults and peak of a step.

Training steps and teachers' answers, batch 128 at 32x32, with and without, each measurement in a
process of its own, in turn. Medians over the rounds.

    python benchmarks/allocator.py --models resnet20 mobilenet_v2_cifar --rounds 3
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

WARM, STEPS = 4, 6
WORK = ("train", "answer")
WAYS = ("as it is", "kept")


def measured(name: str, work: str, way: str) -> dict[str, float]:
    """One measurement, in this process."""
    import torch
    from torch.nn.functional import cross_entropy

    from mpq import zoo
    from mpq.allocator import keep_freed

    if way == "kept" and not keep_freed():
        sys.exit("memory cannot be kept here: not glibc, or the environment decides")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = zoo.build(name, 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train(work == "train")
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(WARM + STEPS):
        if step == WARM:
            before = resource.getrusage(resource.RUSAGE_SELF)
        with torch.set_grad_enabled(work == "train"):
            answers = model(images)
        if work == "train":
            optimizer.zero_grad()
            cross_entropy(answers, labels).backward()
            optimizer.step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "ms": 1000 * seconds / STEPS,
        "faults": (after.ru_minflt - before.ru_minflt) / STEPS,
        "peak_mb": after.ru_maxrss / 1000,
    }


def main() -> None:
    """Measure in turn, print a line per model and work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenet_v2_cifar"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("WORK", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options.models[0], *options.child)))
        return
    from common import setting

    for name in options.models:
        for work in WORK:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way in WAYS:
                    child = [sys.executable, __file__, "--models", name, "--child", work, way]
                    told = subprocess.run(child, capture_output=True, text=True, check=True)
                    found[way].append(json.loads(told.stdout))
            row: dict[str, object] = {"model": name, "work": work}
            for way, rows in found.items():
                row[way] = {k: round(statistics.median(r[k] for r in rows), 1) for k in rows[0]}
            pairs = zip(found["kept"], found["as it is"], strict=True)
            row["ratio"] = [round(kept["ms"] / plain["ms"], 2) for kept, plain in pairs]
            print(json.dumps(row), flush=True)
    print(json.dumps(setting()))


if __name__ == "__main__":
    main()
