"""A row of the table: a network, quantized as the plan says, exported, and judged on its file."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.study.networks import Job, load_subject
from benchmarks.study.plan import Row, Widths
from mpq import files
from mpq.analyze import cost
from mpq.analyze.score import Scoring
from mpq.data.dataset import rows
from mpq.export.bench import file_bytes, top1
from mpq.export.peers import onnxruntime_dynamic
from mpq.pipeline.analyzing import Analyzing, find_policy
from mpq.pipeline.exporting import export_float, export_run
from mpq.pipeline.quantizing import Quantized, run_ptq, run_qat
from mpq.pipeline.subject import Subject
from mpq.policy import DataInfo, LayerPolicy, Policy
from mpq.ptq import PtqSettings
from mpq.rundir import Run
from mpq.spec import activation_spec, weight_spec
from mpq.threads import allowed

SCORED = 512
MODEL, POLICY, FLOAT = "model.onnx", "policy.yaml", "float.onnx"


def make_row(job: Job, row: Row, *, network: Path, teachers: Sequence[Path]) -> dict[str, Any]:
    """Make the file of a row from the network in `network`; returns what is known of it."""
    begun = time.perf_counter()
    plan, subject = job.plan, load_subject(network, job.plan.data, row.unlabelled)
    found: dict[str, Any] = {"row": row.name, "seed": job.seed, "method": row.method}
    if row.method == "float":
        path = export_float(subject, job.folder / MODEL)
    elif row.method == "dynamic":
        source = export_float(subject, job.folder / FLOAT)
        path = onnxruntime_dynamic(source, job.folder / MODEL)
    else:
        assert row.policy is not None
        policy = _policy(job, plan.policies[row.policy], subject)
        path, told = _export(_quantize(job, row, policy, subject, teachers), job.folder)
        found |= told
    epochs = plan.epochs(row.recipe)
    return found | {
        "files": [MODEL] if row.policy is None else [MODEL, POLICY],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "epochs": epochs,
        "images_seen": epochs
        * (len(subject.require_data("the study").train) + len(subject.unlabelled or ())),
        "bytes": file_bytes(path),
        "validation_top1": measured(path, subject, "validation"),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _quantize(
    job: Job, row: Row, policy: Policy, subject: Subject, teachers: Sequence[Path]
) -> Quantized:
    """With training or without, as the row says."""
    if row.recipe is None:
        settings = PtqSettings(effort=job.plan.effort)
        return run_ptq(policy, subject, settings, Run(seed=job.seed))
    training = job.training(job.plan.recipe(row.recipe), teachers)
    return run_qat(policy, subject, training, job.run(), job.hooks())


def measured(path: Path, subject: Subject, split: str) -> float | None:
    """Percent of a split that onnxruntime puts in the right class; None of an empty split."""
    source = getattr(subject.require_data("the study"), split)
    if not len(source):
        return None
    images, labels = subject.arrays(source)

    def share(start: int, stop: int) -> float:
        part = slice(start, stop)
        right = top1(path, rows(images, part), labels[part], subject.normalize)
        return right * (stop - start) / len(labels)

    count = min(len(labels), allowed())
    edges = [len(labels) * i // count for i in range(count + 1)]
    with ThreadPoolExecutor(count) as pool:  # each with a session of its own, on one core
        return round(sum(pool.map(share, edges[:-1], edges[1:])), 3)


def _policy(job: Job, widths: Widths, subject: Subject) -> Policy:
    """The policy of a row, searched once and kept in its folder."""
    kept, seed = job.folder / POLICY, job.seed
    if kept.is_file():
        return Policy.load(kept)
    if widths.budget is not None:
        how = Analyzing(Scoring(widths.bits, seed=seed), samples=SCORED)
        run = Run(job.folder, seed, job.device)
        found = find_policy(subject, widths.budget, how, run)
        policy = found.policy
    else:
        policy = _uniform(widths, subject, seed)
    files.write_text(kept, policy.to_yaml())
    return policy


def _uniform(widths: Widths, subject: Subject, seed: int) -> Policy:
    """Every layer at these widths, but for the ends and an image that keeps its 8 bits."""
    assert widths.uniform is not None
    data = DataInfo(name=subject.data_name, samples=SCORED, seed=seed)
    update: dict[str, Any] = {"model": subject.info, "data": data}
    layers = list(subject.graph().layers)
    if widths.ends is not None:
        wide = {"weight": weight_spec(widths.ends), "activation": activation_spec(widths.ends)}
        ends = (layers[0], layers[-1])
        update["layers"] = tuple(LayerPolicy(name=n, **wide, reason="an end") for n in ends)
    elif widths.uniform[1] < 8:
        image = LayerPolicy(
            name=layers[0], activation=activation_spec(8), reason="images have 8 bits"
        )
        update["layers"] = (image,)
    policy = Policy.uniform(*widths.uniform)
    default = policy.default.replace(residual_bits=widths.residual)
    return policy.replace(**update, default=default)


def _export(made: Quantized, folder: Path) -> tuple[Path, dict[str, Any]]:
    result = export_run(made, folder, force=True)
    files.write_text(folder / POLICY, made.policy.to_yaml())
    layers = made.graph.layers
    choices = made.policy.resolve(list(layers))
    widths = {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()}
    checked = result.verification
    return result.path, {
        "effective_bits": round(cost.effective_bits(layers.values(), widths), 3),
        "agreement": None if checked is None else checked.top1_agreement,
        "integer_coverage": round(result.certificate.integer_macs_fraction, 4),
    }
