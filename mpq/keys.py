"""What each key of a policy means, in the JSON schema by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from mpq.policy import Policy

MEANING = {
    "Policy": {
        "version": "Of this format.",
        "model": "Which network it was made for. Without, it fits any that has its layers.",
        "data": "Which data were looked at.",
        "outputs": "Kinds of outputs by name, of a network that is more than a classifier.",
        "target": "Where the file must run, as `mpq targets` lists it. Without, on this computer.",
        "default": "Formats of a layer that no entry names.",
        "groups": "Layers that read one tensor, and so agree in their activation format.",
        "layers": "Entries from top to bottom; the last match wins, field by field.",
        "constraints": "The budgets that the search was given.",
        "result": "What the search found.",
        "evidence": "Scores and costs by layer, for the reader; nothing reads them.",
    },
    "ModelInfo": {
        "arch": "A zoo or torchvision name, `timm:NAME`, or `package.module:factory`.",
        "checkpoint": "A path, relative to the policy file or to the working directory.",
        "sha256": "Hash of the weights. Without, any weights of the network are taken.",
        "classes": "How many classes the network tells apart.",
        "input": "Channels, height and width of an image.",
        "inputs": "What the network takes by name, where that is more than one image.",
        "normalize": "What is done to images, as `--normalize` takes it.",
        "pictures": "How those of another size are brought to it: filter and share that is kept.",
        "weights": "What `--weights` took of a file that holds several networks.",
    },
    "DataInfo": {
        "name": "As for `--data`.",
        "samples": "Images to calibrate on.",
        "seed": "Of the choice of these images.",
    },
    "DefaultSpec": {
        "weight": "Of the weights, such as `int8/channel`.",
        "activation": "Of the layer's input, such as `uint8/tensor`.",
        "residual_bits": "Of residual sums, of which narrower layers read a rounded copy.",
    },
    "LayerPolicy": {
        "name": "A module path, or a glob such as `layer3.*`; one that matches none is an error.",
        "weight": "Of the weights, such as `int4/channel`, or `float`.",
        "activation": "Of the layer's input, such as `uint8/tensor`, or `float`.",
        "locked": "Whether a search must keep this entry (`mpq analyze --locked`).",
        "reason": "For the reader; nothing reads it.",
    },
    "Constraints": {
        "effective_bits": "Mean width of the weights.",
        "max_size_mb": "The exported file, in MB (10^6 bytes).",
        "max_bops": "10^9 BitOps (MACs x weight bits x activation bits) per image.",
        "max_activation_mb": "Activations alive at one time for one image, in MB.",
        "max_latency_ms": "Milliseconds per batch, as a profile of `mpq profile` predicts them.",
        "max_drop": "Measured loss of top-1 that is allowed.",
        "drop_type": "Whether `max_drop` is in points or in percent of the float accuracy.",
    },
    "SearchResult": {
        "effective_bits": "Mean width of the weights.",
        "weight_bytes": "Of the weights alone.",
        "predicted_bytes": "Of the exported file.",
        "bitops": "MACs x weight bits x activation bits, per image.",
        "activation_bytes": "The most that is alive at one time, for one image.",
        "latency_ms": "Milliseconds per batch, as the profile predicts them.",
        "predicted_drop": "Sum of the scores: nats for metrics that look at answers.",
        "measured_drop": "Points of top-1 on validation images, where a drop was limited.",
        "solver": "Which one searched.",
        "status": "`optimal`: nothing better exists; else the best that was found.",
        "gap": "How far from the best it may be, relative.",
    },
}
"""By model of `mpq.policy` and key; a test keeps it complete."""


def schema() -> dict[str, Any]:
    """The JSON schema of `policy.yaml`, with what each key means."""
    found = Policy.model_json_schema()
    for name, model in {"Policy": found, **found["$defs"]}.items():
        model["description"] = model["description"].partition("\n\nArgs:")[0]
        for key, value in model["properties"].items():
            if text := MEANING.get(name, {}).get(key):
                value["description"] = text
    return found
