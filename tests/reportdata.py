"""What the stages of a small run have written, and the run itself, for tests of its page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnxtext import parse

from mpq.policy import Policy

NAMES = ["conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2) for b in (0, 1) for c in (1, 2))]
NAMES += ["blocks[0].<odd>", "linear"]


def sensitivity():
    layers = [{"name": n, "kind": "conv", "params": 10_000, "macs": 2_500_000} for n in NAMES]
    rows = [
        {"layer": n, "part": part, "bits": bits, "score": (i + 1) * 4.0**-bits, "sqnr": 6.0 * bits}
        for i, n in enumerate(NAMES)
        for part, bits in (("weight", 8), ("weight", 4), ("activation", 8))
    ]
    rows[0]["score"] = 0.0
    front = [
        {
            "effective_bits": 8 - 4 * k / len(NAMES),
            "predicted_drop": 0.01 * 2.0**k,
            "bitops": 1e9,
            "bytes": 200_000 - 9_000 * k,
            "widths": {n: [4 if i < k else 8, 8] for i, n in enumerate(NAMES)},
        }
        for k in range(len(NAMES) + 1)
    ]
    told = {"metric": "fisher", "samples": 512, "seed": 0, "key": "ab"}
    return {**told, "layers": layers, "rows": rows, "front": front, "chosen": front[5]["widths"]}


def certificate():
    keys = ("name", "asked", "stored", "executed", "integer", "reason")
    rows = [
        ("conv1", "W4A8", "int4", "QLinearConv", True, ""),
        ("layer1.0.conv1", "W8A8", "int8", "QLinearConv", True, ""),
        ("linear", "W16A16", "int16", "Gemm", False, "no 16-bit integer kernel"),
    ]
    layers = [{**dict(zip(keys, row, strict=True)), "macs": 2_500_000} for row in rows]
    return {"integer_macs_fraction": 0.983, "boundaries": 2, "layers": layers}


def verify():
    exact = {"name": "conv1", "sqnr_db": 999.0, "max_step": 0, "equal_fraction": 1.0}
    near = {"name": "linear", "sqnr_db": 61.26, "max_step": 3, "equal_fraction": 0.9997}
    near["own_step"] = 1
    return {"top1_agreement": 0.9995, "max_step": 1, "n": 1000, "layers": [exact, near]}


def bench_rows():
    times = {"median": 0.5, "p10": 0.4, "p90": 0.6}
    common = {"n": 10_000, "latency_ms": times, "threads": 1, "batch": 1, "peak_mb": 61.4}
    first = {"file": "runs/a/float.onnx", "bytes": 1_000_000, "top1": 91.73, "ratio_to_float": 1.0}
    second = {"file": "runs/a/model.onnx", "bytes": 160_000, "top1": 91.5, "ratio_to_float": 2.11}
    return [{**first, **common}, {**second, **common}]


def metrics():
    return [
        {"epoch": e, "train_loss": 1 / e, "val_top1": 80.0 + e, "lr": 0.1 / e, "note": "text",
         "teacher_weights": [0.4, 0.6]}
        for e in range(1, 6)
    ]  # fmt: skip


def ranges():
    """Of `ranges.json`: a layer with a value outside its range, and one whose input is float."""
    weight = {"bits": 4, "low": -9.0, "high": 8.0, "counts": [1, 4, 9, 1], "from": -8.0, "to": 7.0}
    part = {**weight, "clipped": 0.01, "sqnr": 19.5}
    rows = [{"layer": "conv1", "weight": part, "activation": {**part, "bits": 8, "sqnr": None}}]
    return {"images": 8, "data": "digits", "layers": [*rows, {**rows[0], "activation": None}]}


def validation():
    """Of `validation.json`."""
    policies = [
        {"effective_bits": 4 + k, "predicted": 0.1 / (k + 1), "kl": 0.2 / (k + 1), "loss": None,
         "top1": None}
        for k in range(4)
    ]  # fmt: skip
    told = {"metric": "fisher", "images": 10, "rho": 1.0, "rho_loss": None}
    return {**told, "policies": policies}


def model(path: Path) -> None:
    """An exported file: two integer layers in a residual block, then one in float."""
    coded = "q{0} = QuantizeLinear({0}, s, z) d{0} = DequantizeLinear(q{0}, s, z)"
    found = parse(
        f"""(float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) {{
            {coded.format("x")}
            w = DequantizeLinear(k, s)
            a = Conv(dx, w)
            r = Relu(a)
            {coded.format("r")}
            b = Conv(dr, w)
            {coded.format("b")}
            c = Add(db, dr)
            {coded.format("c")}
            y = Conv(dc, w)
        }}""",
        s=np.float32(0.1),
        z=np.uint8(128),
        k=np.ones((2, 2, 1, 1), np.int8),
    )
    proto = ir.to_proto(found)
    for node, name in zip([n for n in proto.graph.node if n.op_type == "Conv"], CONVS, strict=True):
        node.name = name
    onnx.save(proto, path)


CONVS = ("conv1", "layer1.0.conv1", "linear")


def write_run(folder: Path) -> Path:
    """A run of which every stage has been."""
    folder.mkdir()
    (folder / "policy.yaml").write_text(policy().to_yaml())
    contents = {"sensitivity": sensitivity(), "certificate": certificate(), "verify": verify()}
    contents |= {"ranges": ranges(), "validation": validation()}
    for name, value in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    for name, rows in (("bench", bench_rows()), ("metrics", metrics())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model(folder / "model.onnx")
    return folder


def policy() -> Policy:
    """The chosen policy: five layers of 4 bits, the last locked at 16."""
    chosen = sensitivity()["chosen"]
    entries = [
        {"name": name, "weight": "int4/channel"} for name, pair in chosen.items() if pair[0] == 4
    ]
    locked = {"name": "linear", "weight": "int8/channel", "locked": True, "reason": "by hand"}
    data = {
        "model": {"arch": "resnet8", "sha256": "ab" * 32, "classes": 10},
        "data": {"name": "digits"},
    }
    return Policy.model_validate({**data, "layers": [*entries, locked]})
