"""The files that are kept of a task evaluate to their rows."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from mpq.export import runtime

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("row", ["w8a8", "w4a8", "8/4"])
def test_a_kept_file_is_as_right_as_its_row_says(mpq_data: Path, row: str) -> None:
    lines = (RESULTS / "rows" / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    told = next(
        found for found in map(json.loads, lines) if (found["task"], found["row"]) == ("kws", row)
    )
    path = RESULTS / "tasks" / f"kws-{row.replace('/', '-')}.onnx"
    assert path.stat().st_size == told["bytes"]
    own = runpy.run_path(str(mpq_data / "tasks" / "kws" / "eval.py"))
    logits = runtime.run(runtime.session(path), own["inputs"]().numpy())
    found = 100 * np.array(own["metric"](logits))
    # Another CPU may break a tie the other way: one clip of 300, one keyword of 100.
    assert found == pytest.approx([told["top1"], told["top1 of keywords"]], abs=1.0)
