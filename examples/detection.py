"""Detection: a network of raw maps, taught by its float self on pictures without boxes.

What the network answers is quantized; boxes are decoded outside of it, in numpy, by `decode`. The
same function stands before the metric (`postprocess`), so that a policy is judged by boxes: how
many of the float network's are found, at an IoU of 0.5, by boxes of the same class.
"""

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import mpq

SIDE, CELLS = 32, 8


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures `[N, 3, H, W]` of one rectangle, its class (red or blue), and x1, y1, x2, y2."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(1, 14, (count, 2), generator=generator)
    box = torch.cat([corner, corner + torch.randint(8, 16, (count, 2), generator=generator)], 1)
    kind = torch.randint(0, 2, (count,), generator=generator)
    line = torch.arange(SIDE)
    x1, y1, x2, y2 = box.T[:, :, None, None]
    across, down = line, line[:, None]
    inside = (across >= x1) & (across < x2) & (down >= y1) & (down < y2)
    colour = torch.tensor([[0.9, 0.3, 0.2], [0.2, 0.3, 0.9]])[kind]
    noise = 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return noise + inside[:, None] * colour[:, :, None, None], kind, box


class Detector(nn.Module):
    """For each of 8x8 cells: logits of two classes and of none, and distances to four sides."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 2), (16, 32, 2), (32, 32, 1), (32, 32, 1)
        blocks = [[nn.Conv2d(i, o, 3, stride, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
                  for i, o, stride in sizes]  # fmt: skip
        self.body = nn.Sequential(*(layer for block in blocks for layer in block))
        self.classes, self.box = nn.Conv2d(32, 3, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Two maps."""
        x = self.body(x)
        return {"class_logits": self.classes(x), "box": self.box(x)}


def centres() -> np.ndarray:
    """The middle of each cell, `[2, 8, 8]` as x and y in pixels."""
    line = (np.arange(CELLS) + 0.5) * SIDE / CELLS
    return np.stack(np.meshgrid(line, line))


def decode(maps: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Boxes, scores and labels of each picture: the best cell of each class that is sure enough."""
    logits = np.asarray(maps["class_logits"], np.float64)
    power = np.exp(logits - logits.max(1, keepdims=True))
    scores = (power / power.sum(1, keepdims=True))[:, :2].reshape(len(logits), 2, -1)
    middle, sides = centres(), 10 * np.asarray(maps["box"])
    corners = np.concatenate([middle - sides[:, :2], middle + sides[:, 2:]], 1)
    corners = corners.reshape(len(logits), 4, -1)
    found = []
    for score, box in zip(scores, corners, strict=True):
        best = score.argmax(1)
        sure = [k for k in (0, 1) if score[k, best[k]] > 0.3]
        found.append({"boxes": box[:, best[sure]].T, "labels": np.array(sure),
                      "scores": score[sure, best[sure]]})  # fmt: skip
    return found


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2])
    both = float(np.prod(sides.clip(0)))
    areas = sum(float(np.prod(box[2:] - box[:2])) for box in (one, two))
    return both / max(areas - both, 1e-9)


def hits(found: list[dict[str, np.ndarray]], batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """100 for each picture whose rectangle is found, else 0."""
    return torch.tensor([
        100.0 * any(label == int(kind) and overlap(box, truth.numpy()) > 0.5
                    for box, label in zip(one["boxes"], one["labels"], strict=True))
        for one, kind, truth in zip(found, *batch[1:], strict=True)
    ])  # fmt: skip


def loss(maps: dict[str, torch.Tensor], kind: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the cells, and the distances to the sides where there is a rectangle."""
    middle = torch.tensor(centres())[None]
    sides = torch.cat([middle - box[:, :2, None, None], box[:, 2:, None, None] - middle], 1) / 10
    inside = (sides > 0).all(1)
    wanted = torch.where(inside, kind[:, None, None], 2)
    apart = (maps["box"] - sides).abs().mean(1)[inside].mean()
    return F.cross_entropy(maps["class_logits"], wanted) + apart.float()


torch.manual_seed(0)
model, (x, kind, box) = Detector(), pictures(512, seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(120):
    at = torch.randint(len(x), (32,))
    optimizer.zero_grad()
    loss(model(x[at]), kind[at], box[at]).backward()
    optimizer.step()
model.eval()

test = [pictures(64, seed=1)]
policy = mpq.Policy.uniform(4, 8)
how = {"validation": test, "metric": hits, "postprocess": decode}
quantized = mpq.ptq(model, x, policy, **how)
settings = {"batch": 32, "optimizer": "adamw", "lr": 3e-4, "crop": 0.0}
trained = mpq.qat(model, x, policy, epochs=2, settings=settings, **how)
print(f"float {quantized.metrics['float_value']:.2f} %")
print(f"quantized {quantized.metrics['value']:.2f} %")
print(f"trained {trained.metrics['value']:.2f} % of the rectangles found")
print(mpq.export(trained, "model.onnx", data=test[0][0]))

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]
answer = session.run(names, {session.get_inputs()[0].name: test[0][0].numpy()})
boxes = decode(dict(zip(names, answer, strict=True)))
print("first picture:", boxes[0]["labels"], boxes[0]["boxes"].round(1), "is", test[0][2][0].numpy())
