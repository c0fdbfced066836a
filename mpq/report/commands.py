"""The commands that make a run again, from what its files say."""

from __future__ import annotations

import os
import shlex

from mpq import origins, rundir
from mpq.policy import ModelInfo, Policy
from mpq.report.contents import Contents


def commands(run: Contents) -> str:
    """One line for each stage that the run has; empty where no policy says what it is of."""
    policy = run.policy
    if policy is None or policy.model is None:
        return ""
    by = {name: one.by for name, one in origins.origins(run.folder).items()}
    there = {path.name for path in run.there}
    lines = [_analyze(run, policy)] if "sensitivity.json" in there else []
    stages = [name for name in rundir.QUANTIZED if name in there]
    epochs = run.read("metrics.jsonl", len)
    for name in stages:
        stage = by.get(name, "ptq")
        trained = f" --epochs {epochs}" if stage == "qat" and epochs else ""
        lines.append(f"mpq {stage} {run.folder}{trained}")
    if "model.onnx" in there:
        lines.append(f"mpq export {run.folder}")
    if "bench.jsonl" in there:
        peers = " --peers" if (run.folder / "peers").is_dir() else ""
        lines.append(f"mpq bench{peers} {run.folder}/model.onnx")
    if "portability.json" in there:
        lines.append(f"mpq portability {run.folder}")
    return "\n".join([*lines, f"mpq report {run.folder}"])


def _analyze(run: Contents, policy: Policy) -> str:
    assert policy.model is not None
    scores = run.read("sensitivity.json", lambda found: found) or {}
    words = ["mpq", "analyze", _checkpoint(run, policy.model), "--model", policy.model.arch]
    words += ["--data", policy.data.name]
    if policy.model.normalize:
        words += ["--normalize", policy.model.normalize]
    for part, option in (("weight", "--bits"), ("activation", "--act-bits")):
        bits = {row["bits"] for row in scores.get("rows", ()) if row["part"] == part}
        if bits:
            words += [option, ",".join(str(b) for b in sorted(bits, reverse=True))]
    if scores and scores["samples"]:
        words += ["--metric", scores["metric"], "--num-calib", str(scores["samples"])]
        words += ["--seed", str(scores["seed"])]
    limits = policy.constraints.model_dump(exclude={"drop_type"}, exclude_none=True)
    for name, value in limits.items():
        words += [f"--{name.replace('_', '-')}", f"{value:g}"]
    return f"{shlex.join([*words, '-o'])} {run.folder}"


def _checkpoint(run: Contents, model: ModelInfo) -> str:
    """The file of the weights, which a policy names as seen from its own place."""
    if not model.checkpoint:
        return "MODEL.pth"
    path = os.path.normpath(run.folder / model.checkpoint)
    return os.path.relpath(path) if os.path.exists(path) else model.checkpoint
