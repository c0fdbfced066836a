"""The rows of `coverage.py` as a page: a line a group, what failed and why, a line a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mpq.export import runtime

Row = dict[str, Any]


def rows(out: Path) -> dict[str, Row]:
    """What is measured, the last of each network."""
    lines = out.read_text().splitlines() if out.is_file() else []
    return {row["network"]: row for row in map(json.loads, lines)}


_HEAD = """Networks with random weights on noise: captured, scored, 6 effective bits of 8 and 4,
min-max ranges, rounding to nearest, one ONNX file that is certified and verified. Made by
`benchmarks/coverage.py`, which goes on where it stopped, those with the fewest parameters first.
Groups that are not in `benchmarks/networks.py` were given with `--more`.

- *Captured*: nothing of it was left unopened.
- *Verified*: no layer alone is more than a step off, and file and simulation agree on 4 inputs,
  with the runtime's optimizations and without. Maps and sequences of logits are compared as
  quantities, as untrained ones choose nothing but ties. Networks that amplify single steps have
  a *: see below.
- *All integer*: every layer that the target can run as integers does.
- *Within 1 %*: bytes of the file, predicted before it was quantized, against those written.
"""

_AMPLIFY = """## Networks that amplify single steps

Without training, some networks are chaotic: where float32 rounds a tie the other way, one integer
is a step off, and the layers after it make more of that than of the picture. No bound on the
answers tells a right file from a wrong one there, so it is shown otherwise: no layer alone is more
than a step off, and the integer reference predicts the output of every integer kernel of the file,
bit for bit, as `mpq verify --exact` does. How far one step at one integer of the input takes the
simulation from itself is said beside; a file has such steps at every depth. `mpq export` refuses
these files all the same: what was measured on the simulation is not what they answer. They were
written without images to compare on.
"""


def table(measured: dict[str, Row], networks: list[str]) -> str:
    """The rows as Markdown, and which networks have none."""
    found = {n: row for n, row in measured.items() if "missing" not in row}
    groups: dict[str, list[Row]] = {}
    for name, row in found.items():
        groups.setdefault(group_of(name), []).append(row)
    of = {group: sum(group_of(n) == group for n in networks) for group in groups}
    absent = [name for name in networks if name not in found]
    lines = [
        "# From any network to a verified file\n",
        _summary(list(found.values()), sum(of.values())),
        f"onnxruntime {runtime.version()}, torch {torch.__version__}.\n",
        "| group | networks | measured | captured | verified | all integer | within 1 % |",
        "|---" * 7 + "|",
        *(_group(group, max(of[group], len(own)), own) for group, own in groups.items()),
        _group("all", sum(of.values()), list(found.values())),
        f"\n{_HEAD}\n## What did not come through\n",
        *(_complaints(found[name]) for name in sorted(found) if _wrong(found[name])),
        f"\n{_AMPLIFY}",
        "| network | simulation and file | integers predicted |",
        "|---" * 3 + "|",
        *(_amplifies(found[name]) for name in sorted(found) if "exact" in found[name]),
        f"\n## Not measured ({len(absent)})\n\n{', '.join(absent) or 'none'}",
        "\n## Network by network\n",
        "*Agree*: equal choices, or SQNR in dB where there is no choice. *Step*: the most that a "
        "layer alone is off.\n",
        "| network | millions | integer | agree | step | predicted | written | off |",
        "|---" * 8 + "|",
        *(_line(found[name]) for name in sorted(found)),
    ]
    return "\n".join(lines) + "\n"


def _summary(own: list[Row], count: int) -> str:
    """What a reader wants to know first."""
    through = [r for r in own if "written" in r]
    layers, could = (sum(r[key] for r in through) for key in ("integer", "could"))
    near = sum(abs(_off(r)) <= 0.01 for r in through)
    exact = sum("exact" in r and r["verified"] for r in own)
    same = sum(r["verified"] for r in own) - exact
    return (
        f"{len(own)} of {count} networks measured: {sum(r['captured'] for r in own)} captured "
        f"whole, {same + exact} through all stages to a verified file. {same} of these answer as "
        f"the simulation does; of {exact}, which amplify single steps, every integer is predicted "
        f"bit for bit. {layers:,} of {could:,} layers that the target can run as integers do. The "
        f"bytes of {near} of {len(through)} files were predicted within 1 %.\n"
    )


def _group(name: str, count: int, own: list[Row]) -> str:
    through = [r for r in own if "written" in r]
    kept = (
        len(own),
        sum(r["captured"] for r in own),
        sum(r["verified"] for r in own),
        sum(r["integer"] >= r["could"] for r in through),
        sum(abs(_off(r)) <= 0.01 for r in through),
    )
    return f"| {name} | {count} | {' | '.join(map(str, kept))} |"


def _wrong(row: Row) -> list[str]:
    """What is short of the whole way, in words."""
    words = [_short(row.get("reason", ""))] if not (row["captured"] and row["verified"]) else []
    if row.get("islands"):
        words += [
            f"`{path}` is kept as it is: {_short(why)}" for path, why in row["islands"].items()
        ]
    if "written" in row and row["integer"] < row["could"]:
        words.append(f"{row['integer']} of {row['could']} layers run as integers")
    if "written" in row and abs(_off(row)) > 0.01:
        words.append(f"bytes are {_off(row):+.1%} off")
    return words


def _amplifies(row: Row) -> str:
    """What was said of simulation and file, and how many integers were held against kernels."""
    known, said = row["exact"], row["reason"].partition(": ")[2].rpartition(": does")[0]
    count = f"{known['values']:,} of {known['nodes']} kernels; {known['differ']} differ"
    return f"| {row['network']} | {said} | {count} |"


def _complaints(row: Row) -> str:
    return f"- {row['network']}: {'; '.join(_wrong(row))}"


def _short(text: str) -> str:
    """A reason without the folders of this computer, in a line."""
    words = [w.rpartition("/")[2] if w.startswith("/") else w for w in text.split()]
    return " ".join(words)[:300]


def _off(row: Row) -> float:
    return float(row["predicted"] / row["written"] - 1)


def _line(row: Row) -> str:
    begin = f"| {row['network']} | {row.get('params', 0) / 1e6:.2f} | "
    if "written" not in row:
        return f"{begin}- | - | - | - | - | - |"
    agree = "-" if row.get("sqnr_db") is None else f"{row['sqnr_db']:.0f} dB"
    agree = agree if row.get("agreement") is None else f"{row['agreement']:.0%}"
    agree = f"{agree} *".lstrip("- ") if "exact" in row else agree
    agree += " on coarse noise" * ("noise" in row)  # as rows of before were made
    sizes = f"{row['predicted']:,} | {row['written']:,} | {_off(row):+.1%}"
    step = row.get("own_step", "-")
    return f"{begin}{row['integer']} of {row['could']} | {agree} | {step} | {sizes} |"


def group_of(name: str) -> str:
    """The part of a name before the colon."""
    return name.partition(":")[0]
