"""Training on more pictures than memory holds: resident memory, and speed beside plain PyTorch.

    python benchmarks/feeding.py                     100,000 pictures, about ten minutes of one core
    python benchmarks/feeding.py --images 20000

The folder is made up: `DISTINCT` noise pictures of 256 x 224 pixels are encoded as JPEG and written
under many names (each a file of its own), in 1,000 classes in train/ and some in val/. Then, in
turn, a plain loop (torch's DataLoader over torchvision's ImageFolder: the same files, batch,
network, optimizer, number of workers, Resize and CenterCrop to 224, mirrored batches) and `mpq
train`, each in a process of its own, which is looked at every two seconds: it and its workers, by
/proc (RSS, and PSS, which counts shared pages once). Both train a very small network, so that
decoding is most of the work. What counts is images per second of mpq over those of the plain loop,
of the steps alone, in pairs of runs whose order alternates; and images per processor second, which
a busy machine does not disturb.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import setting
from PIL import Image

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "rows" / "feeding.jsonl"
DISTINCT = 400
CLASSES = 1000
HELD_OUT = 1000
BATCH = 256
SIDE = 224


def make(folder: Path, count: int) -> None:
    """The pictures: blurred noise, so that a file has about the bytes of a photograph."""
    rng = np.random.default_rng(0)
    encoded = []
    for i in range(DISTINCT):
        coarse = rng.integers(0, 256, (32, 28, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((SIDE, 256), Image.Resampling.BICUBIC)
        path = folder / f"one-{i}.jpg"
        picture.save(path, quality=85)
        encoded.append(path.read_bytes())
        path.unlink()
    for split, number in (("train", count), ("val", HELD_OUT)):
        for name in range(CLASSES):
            (folder / split / f"{name:04}").mkdir(parents=True)
        for i in range(number):
            path = folder / split / f"{i % CLASSES:04}" / f"{i}.jpg"
            path.write_bytes(encoded[i % DISTINCT])


def network(classes: int = CLASSES) -> Any:
    """A very small one."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


network.input_size = (3, SIDE, SIDE)  # type: ignore[attr-defined]  # as mpq asks for it


def plain(folder: Path, workers: int) -> None:
    """The loop that people write; prints seconds and images."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from mpq._torchvision import transforms

    transforms()  # torchvision loads beside a torch without CUDA too
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    change = v2.Compose([v2.Resize(SIDE), v2.CenterCrop(SIDE), v2.PILToTensor()])
    torch.manual_seed(0)
    loader = DataLoader(ImageFolder(folder / "train", change), BATCH, shuffle=True,
                        num_workers=workers, drop_last=True)  # fmt: skip
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                         (0.229, 0.224, 0.225)))  # fmt: skip
    clock, seen = Clock(), 0
    for images, labels in loader:
        mirrored = torch.rand(len(images)) < 0.5
        images[mirrored] = images[mirrored].flip(3)
        loss = F.cross_entropy(model((images.float() / 255 - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += len(images)
        assert loss.isfinite()
    clock.tell(seen)


class Clock:
    """Wall and processor seconds of this process and of the workers that have ended."""

    def __init__(self) -> None:
        self.begun = self._now()

    def _now(self) -> tuple[float, float]:
        kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
        used = [resource.getrusage(kind) for kind in kinds]
        return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in used)

    def tell(self, images: int) -> None:
        """Print what `run` reads."""
        wall, cpu = (b - a for a, b in zip(self.begun, self._now(), strict=True))
        print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "images": images}))


def ours(folder: Path, workers: int, out: Path) -> None:
    """`mpq train`, with a clock around its steps."""
    from mpq.cli import main
    from mpq.train.engine import Engine

    epoch = Engine.train_epoch

    def timed(self: Engine, *args: Any) -> Any:
        clock = Clock()
        found = epoch(self, *args)
        clock.tell(self.feed.steps * BATCH)
        return found

    Engine.train_epoch = timed  # type: ignore[method-assign]
    settings = {"batch": BATCH, "crop": 0, "lr": 0.01, "weight_decay": 0}
    sets = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    sys.path.insert(0, str(HERE))
    options = ["--data", str(folder), "--workers", str(workers), "--normalize", "imagenet", *sets]
    main(["--limit", "arrays-mb=1", "train", "feeding:network", "--epochs", "1", *options,
          "-o", str(out)])  # fmt: skip


class Watch(threading.Thread):
    """Memory of a process and its children over time, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.seen = psutil.Process(pid), []

    def run(self) -> None:
        """Look until the process ends."""
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            try:
                own = self.root.memory_info().rss
                children = [c.memory_full_info() for c in self.root.children(recursive=True)]
                pss = self.root.memory_full_info().pss + sum(c.pss for c in children)
                self.seen.append((own / 1e6, sum(c.rss for c in children) / 1e6, pss / 1e6))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass
            time.sleep(2)

    def summary(self) -> dict[str, float]:
        """Medians over the second and the last quarter of the run, and the peak."""
        quarter = max(1, len(self.seen) // 4)
        parts = {"second": self.seen[quarter : 2 * quarter], "last": self.seen[-quarter - 2 : -2]}
        found = {}
        for name, seen in parts.items():
            for at, kind in enumerate(("parent_rss", "workers_rss", "all_pss")):
                found[f"{kind}_mb_{name}"] = round(statistics.median(s[at] for s in seen), 1)
        return {**found, "all_pss_mb_peak": round(max(s[2] for s in self.seen), 1)}


def run(role: str, folder: Path, workers: int, out: Path) -> dict[str, float]:
    """One of the two in a process of its own."""
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder),
               "--workers", str(workers), "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE)
    watch = Watch(process.pid)
    watch.start()
    output, _ = process.communicate()
    watch.join()
    if process.returncode:
        raise SystemExit(f"{role} failed")
    told = next(json.loads(line) for line in output.splitlines() if line.startswith("{"))
    rate = told["images"] / told["seconds"]
    per_cpu = told["images"] / told["cpu_seconds"]
    rates = {"images_per_second": round(rate, 1), "images_per_cpu_second": round(per_cpu, 1)}
    return {**rates, "images": told["images"], **watch.summary()}


def main() -> None:
    """Make the pictures, run the pairs, write a row, remove the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3, help="on part of the pictures")
    parser.add_argument("--part", type=int, default=10_000, help="pictures of a pair")
    parser.add_argument("--role", choices=["plain", "ours"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.role == "plain":
        plain(asked.folder, asked.workers)
    elif asked.role == "ours":
        ours(asked.folder, asked.workers, asked.out)
    else:
        compare(asked)


def compare(asked: argparse.Namespace) -> None:
    """All of it: pairs on a part of the pictures, then mpq on all of them."""
    common = {"decoded_mb": round(asked.images * SIDE * SIDE * 3 / 1e6), "batch": BATCH}
    common |= {"pictures": asked.images, "workers": asked.workers, **setting()}
    with tempfile.TemporaryDirectory(prefix="feeding-") as made:
        root = Path(made)
        for name, count in (("part", asked.part), ("all", asked.images)):
            (root / name).mkdir()
            make(root / name, count)
        pairs = []
        for pair in range(asked.pairs):
            found = {}
            for role in ("plain", "ours") if pair % 2 == 0 else ("ours", "plain"):
                found[role] = run(role, root / "part", asked.workers, root / f"{pair}.pth")
            pairs.append(found)
            print(f"pair {pair}:", json.dumps(found), flush=True)
        ratios: dict[str, Any] = {}
        for kind in ("images_per_second", "images_per_cpu_second"):
            each = [round(p["ours"][kind] / p["plain"][kind], 3) for p in pairs]
            ratios |= {f"{kind}_ratios": each, f"{kind}_ratio": statistics.median(each)}
        keep({"what": "pairs", **common, "part": asked.part, **ratios, "pairs": pairs})
        whole = run("ours", root / "all", asked.workers, root / "all.pth")
        keep({"what": "memory", **common, **whole})


def keep(row: dict[str, Any]) -> None:
    """Add a row, and print it."""
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    random.seed(0)
    main()
