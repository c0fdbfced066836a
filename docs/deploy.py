"""Classify raw images with an exported file: numpy and onnxruntime, nothing of mpq.

    mpq export --input uint8                 writes runs/NAME/model.onnx
    python docs/deploy.py model.onnx images.npy [--threads 2]

`images.npy` holds uint8 RGB images `[n, H, W, 3]` of the size that the model was made for.
"""

from __future__ import annotations

import argparse

import numpy as np
import onnxruntime as ort


def main() -> None:
    """Print the class of each image and how sure the model is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = ort.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    pixels = session.get_inputs()[0]
    images = np.load(args.images)
    if pixels.shape[1] == 3:  # exported with --layout nchw
        images = images.transpose(0, 3, 1, 2)
    logits = session.run(None, {pixels.name: np.ascontiguousarray(images)})[0]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    for k, p in enumerate(odds / odds.sum(1, keepdims=True)):
        print(f"{k}: class {p.argmax()} ({p.max():.1%})")


if __name__ == "__main__":
    main()
