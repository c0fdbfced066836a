"""The accuracy table: networks x widths x calibration seeds, judged on the exported files.

For each network the layers are scored once a seed, budgets are solved from that scoring, quantized
without training, exported to ONNX and run in onnxruntime on all test images. Every measurement is a
line of `accuracy.jsonl`; what is there already is not measured again, so that an interrupted run
goes on where it stopped.

    MPQ_DATA=... python benchmarks/accuracy.py --out runs/accuracy
    MPQ_DATA=... python benchmarks/accuracy.py --models resnet20 --only w4a8 4.8 --seeds 5
    MPQ_DATA=... python benchmarks/accuracy.py --effort best --only w4a4

With `--target` files are made for CPUs of another kind and run on this one all the same, as happens
to files that travel.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import UNIFORM, accuracy_of, answers, setting, uniform

from mpq.analyze import Scoring, Search, build_policy, score_layers
from mpq.analyze.sensitivity import Sensitivity
from mpq.checkpoint import Reading
from mpq.data import Normalization, load_arrays
from mpq.export import float_to_onnx, to_onnx
from mpq.export.peers import onnxruntime_static
from mpq.pipeline.quantizing import run_ptq
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.policy import Constraints, DataInfo, Policy
from mpq.ptq import EFFORTS, EQUALIZE, Learning, PtqSettings
from mpq.rundir import Run
from mpq.targets import TARGETS, this_target
from mpq.userimport import trust


@dataclass(frozen=True)
class Network:
    """A checkpoint of the data folder: file, data set, normalization, architecture if unknown."""

    file: str
    data: str = "cifar10"
    normalize: str = "imagenet"
    arch: str | None = None


_K = ".4914,.4822,.4465/.2023,.1994,.2010"
_C100 = ".507,.487,.441/.267,.256,.276"
_FOREIGN = "benchmarks.foreign_models:"
NETWORKS = {
    "resnet20": Network("resnet20-cifar10.pth"),
    "resnet32": Network("resnet32-cifar10.pth"),
    "resnet44": Network("resnet44-cifar10.pth"),
    "resnet56": Network("resnet56-cifar10.pth"),
    "resnet56-conv": Network("resnet56-conv-shortcut-cifar10.pth", normalize=_K),
    "resnet8": Network(
        "mlperf-tiny-resnet8-cifar10.pth", normalize="raw", arch=f"{_FOREIGN}mlperf_tiny_resnet8"
    ),
    "stage-relu-20": Network(
        "resnet20-stage-relu-cifar100.pth", "cifar100", _C100, f"{_FOREIGN}resnet_stage_relu_20"
    ),
    "stage-relu-32": Network(
        "resnet32-stage-relu-cifar100.pth", "cifar100", _C100, f"{_FOREIGN}resnet_stage_relu_32"
    ),
}
BUDGETS = ("4.2", "4.5", "4.8", "5.2", "6.0", "7.0")
"""Effective bits from 8 and 4; `4.2+2` has 2-bit weights among the choices, `4.8a84` activations of
8 and 4 bits."""
EXTRAS = ("3.5+2", "4.2+2", "4.8+2", "4.8a84")
PEER = "onnxruntime int8"
CONFIGURATIONS = ("float", PEER, *UNIFORM, *BUDGETS, *EXTRAS)
SEEDLESS = ("float", PEER)


class Bench:
    """One network, opened once."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        network = NETWORKS[name]
        trust(network.arch or "")  # our own module
        self.subject: Subject = open_checkpoint(
            Path(os.environ["MPQ_DATA"]) / "checkpoints" / network.file,
            DataSource(network.data),
            reading=Reading(arch=network.arch),
            normalize=Normalization.parse(network.normalize),
        )
        self.folder: Path = options.out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scores: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Sensitivity] = {}

    @cached_property
    def test(self) -> Any:
        """Images and labels of the test split."""
        return load_arrays(self.subject.require_data("the table").test)

    def policy(self, configuration: str, seed: int) -> tuple[Policy, dict[str, float]]:
        """The policy of a configuration, and what it cost to find."""
        data = DataInfo(name=self.subject.data_name, samples=self.options.samples, seed=seed)
        target = self.options.target
        named = {"model": self.subject.info, "data": data, "target": target}
        if configuration in UNIFORM:
            policy = uniform(configuration, self.subject.graph().layers)
            return policy.replace(**named), {}
        plain, _, acts = configuration.partition("a")
        budget, _, more = plain.partition("+")
        bits = (8, 4, *map(int, more))
        act_bits = tuple(map(int, acts)) or (8,)
        start = time.process_time()
        sensitivity = self._score(seed, bits, act_bits)
        scored = time.process_time()
        constraints = Constraints(effective_bits=float(budget))
        if acts:  # without a price, an activation would never be narrow
            constraints = Constraints(effective_bits=float(budget), max_bops=self._bops(budget))
        chosen = Search(sensitivity).allocate(constraints)
        spent = {"score_s": scored - start, "solve_s": time.process_time() - scored}
        policy = build_policy(chosen, sensitivity, constraints=constraints, **named)
        return policy, {k: round(v, 3) for k, v in spent.items()}

    def _bops(self, budget: str) -> float:
        """10^9 BitOps at the budget's weight bits and activations of 6 bits on average."""
        macs = sum(layer.macs for layer in self.subject.graph().layers.values())
        return 1.1 * macs * float(budget) * 6 / 1e9

    def _score(self, seed: int, bits: tuple[int, ...], acts: tuple[int, ...]) -> Sensitivity:
        key = (seed, bits, acts)
        if key not in self.scores:
            images = self.subject.sample(self.options.samples, seed, "scoring")
            graph = self.subject.graph()
            self.scores[key] = score_layers(
                graph, images, how=Scoring(bits=bits, act_bits=acts, seed=seed)
            )
        return self.scores[key]

    def file(self, configuration: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """Make the model file of a configuration."""
        reference = self.folder / "float.onnx"
        if not reference.is_file():
            float_to_onnx(self.subject.graph(), reference)
        if configuration == "float":
            return reference, {}
        if configuration == PEER:
            images = self.subject.sample(self.options.samples, seed, "calibration")
            out = self.folder / "peer-static.onnx"
            return onnxruntime_static(reference, out, images.numpy()), {}
        policy, spent = self.policy(configuration, seed)
        start = time.process_time()
        settings = PtqSettings(
            effort=self.options.effort,
            equalization=self.options.equalize,
            learning=Learning(iterations=self.options.iterations),
        )
        found = run_ptq(policy, self.subject, settings, Run(seed=seed))
        spent["ptq_s"] = round(time.process_time() - start, 1)
        layers = list(found.graph.layers.values())
        choices = policy.resolve([layer.name for layer in layers])
        stored = sum(layer.params * (choices[layer.name].weight_bits or 32) for layer in layers)
        spent["effective_bits"] = round(stored / sum(layer.params for layer in layers), 3)
        kind = f"{self.options.effort}-{self.options.target}"
        path = self.folder / f"{configuration}-{kind}-seed{seed}.onnx"
        result = to_onnx(found.graph, path)
        spent["integer_macs"] = result.certificate.integer_macs_fraction
        return path, spent

    def row(self, configuration: str, seed: int) -> dict[str, Any]:
        """Measure a configuration."""
        path, spent = self.file(configuration, seed)
        images, labels = self.test
        given = answers(path, images, self.subject.normalize)
        key = row_key(self.name, configuration, seed, self.options)
        return key | accuracy_of(given, labels) | {"bytes": path.stat().st_size} | spent


def row_key(
    name: str, configuration: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """What tells one measurement from the others."""
    made = configuration not in SEEDLESS
    return {
        "network": name,
        "configuration": configuration,
        "seed": seed,
        "effort": options.effort if made else "",
        "equalize": options.equalize if made else "",
        "iterations": options.iterations if made and options.effort == "best" else 0,
        "samples": options.samples,
        "target": options.target if made else "",
    }


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The measurements that a file holds."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Network, configuration and seed of each measurement, the most telling ones first."""
    for name in options.models:
        for seed in range(options.seeds):
            for configuration in options.only:
                if seed == 0 or configuration not in SEEDLESS:
                    yield name, configuration, seed


def _effort(row: dict[str, Any]) -> str:
    """How a file was quantized, as far as it was not done the usual way."""
    steps = f", {row['iterations']} steps" if row["iterations"] else ""
    equalized = "" if row["equalize"] in ("", "auto") else f", equalize {row['equalize']}"
    target = row.get("target", "")
    elsewhere = f", for {target}" if target not in ("", this_target().name) else ""
    return f"{row['effort']}{steps}{equalized}{elsewhere}"


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a Markdown table, one line per network and configuration."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["configuration"], _effort(row)), []).append(row)
    order = {c: i for i, c in enumerate(CONFIGURATIONS)}
    places = {n: i for i, n in enumerate(NETWORKS)}
    lines = [
        "| network | widths | effort | bits | bytes | top-1 (all) | spread | last 5,000 | seeds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, configuration, effort), found in sorted(
        groups.items(), key=lambda item: (places[item[0][0]], order[item[0][1]], item[0][2])
    ):
        top1 = np.array([row["top1"] for row in found])
        last = np.mean([row["top1_last_5000"] for row in found])
        bits = np.mean([row.get("effective_bits", np.nan) for row in found])
        size = max(row["bytes"] for row in found)
        spread = f"{top1.min():.2f}..{top1.max():.2f}" if len(found) > 1 else ""
        cells = (
            name, configuration, effort, "" if np.isnan(bits) else f"{bits:.2f}", f"{size:,}",
            f"{top1.mean():.2f}", spread, f"{last:.2f}", str(len(found)),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table of all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds, from 0 on")
    parser.add_argument("--effort", choices=EFFORTS, default="good")
    parser.add_argument("--equalize", choices=EQUALIZE, default="auto")
    parser.add_argument("--iterations", type=int, default=Learning.iterations)
    parser.add_argument("--samples", type=int, default=512, help="images to score and calibrate on")
    parser.add_argument("--target", choices=TARGETS, default=this_target().name)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table; measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "accuracy.jsonl"
    bench: Bench | None = None
    for name, configuration, seed in () if options.table else wanted(options):
        key = row_key(name, configuration, seed, options)
        if any(key.items() <= row.items() for row in rows_of(file)):
            continue
        if bench is None or bench.name != name:
            bench = Bench(name, options)
        row = bench.row(configuration, seed) | {"setting": setting()}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        told = {k: v for k, v in row.items() if k != "setting"}
        print(json.dumps(told), flush=True)
    print(table(rows_of(file)))
    print(json.dumps(setting()))


if __name__ == "__main__":
    main()
