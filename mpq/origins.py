"""What the files of a run were made from, so that nothing stale is believed: `origins.json`.

Every stage notes, in the step that puts its files in place, the hash of each and of what it was
made from: other files of the run, and the weights that its policy names. Whoever uses a file asks
first (`require`), whoever shows a proof asks more strictly (`doubt`). As with `dvc.lock`, contents
count, not dates: a run can be copied, and a file that is made again as it was stays good. What was
made last stands last, which says the newest of several without a date either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpq import rundir
from mpq.errors import UsageError
from mpq.files import write_json, write_text
from mpq.limits import read_text
from mpq.policy import Policy
from mpq.staging import together

FILE = "origins.json"
POLICY, WEIGHTS = "policy.yaml", "weights"
LARGE = 1_000_000
"""Bytes of a file from which on it is not hashed twice."""
AGAIN = {
    "policy.yaml": "mpq analyze {run} --force",
    "sensitivity.json": "mpq analyze {run} --force",
    "tensors.json": "mpq diagnose {run}",
    "validation.json": "mpq analyze {run} --force --validate 50",
    "ptq.pth": "mpq ptq {run} --force",
    "qat.pth": "mpq qat {run} --force",
    "quantized.pth": "mpq {by} {run} --force",
    "metrics.jsonl": "mpq qat {run} --force",
    "ranges.json": "mpq report {run}",
    "model.onnx": "mpq export {run} --force",
    "float.onnx": "mpq export {run} --force",
    "certificate.json": "mpq export {run} --force",
    "verify.json": "mpq verify {run}",
    "exact.json": "mpq verify --exact {run}",
    "portability.json": "mpq portability {run}",
    "bench.jsonl": "mpq bench {run}/model.onnx",
    "diagnosis.json": "mpq diagnose {run}",
    "demo.json": "mpq demo -o {run} --force",
}
"""The command that makes a file anew."""


@dataclass(frozen=True)
class Origin:
    """Where a file comes from.

    Args:
        by: the command that wrote it.
        sha256: what it was then (`identity`).
        made_from: the same of each file of the run that it was made from, and of the `weights`;
            of what lies in no run, such as `data`, what is known.
    """

    by: str
    sha256: str
    made_from: Mapping[str, str]


def note(aside: Path, run: Path, by: str, files: Mapping[str, Mapping[str, str]]) -> None:
    """Note in `aside` what each file was made from; what `run` knows of others stays.

    Args:
        aside: the folder of a stage's files, before they take their places in `run`.
        run: the run.
        by: the command.
        files: by name, as `Origin.made_from`; those that are not in `aside` are in `run` already.
    """
    known = origins(run).items()
    kept = {name: one for name, one in known if name not in files and (run / name).exists()}
    for name, made_from in files.items():
        place = aside if (aside / name).exists() else run
        kept[name] = Origin(by, identity(place / name), {k: v for k, v in made_from.items() if v})
    write_json(aside / FILE, {name: asdict(one) for name, one in kept.items()})


def chain(path: Path) -> dict[str, str]:
    """What is made from a file is made from: the file as it is now, and all that is noted of it."""
    found, now = origins(path.parent).get(path.name), identity(path)
    return {path.name: now, **(found.made_from if found and found.sha256 == now else {})}


def keep(run: Path, name: str, text: str, by: str, of: Sequence[Path]) -> None:
    """Put a text into a run, and note which files of the run it is of."""
    own = [path for path in of if path.parent.resolve() == run.resolve()]
    made_from = {key: value for path in own for key, value in chain(path).items()}
    with together(run) as aside:
        write_text(aside / name, text)
        note(aside, run, by, {name: made_from})


def origins(run: Path) -> dict[str, Origin]:
    """What is noted in a run; nothing in one of an earlier version."""
    try:
        found = json.loads(read_text(run / FILE, UsageError))
        return {name: Origin(**entry) for name, entry in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        again = "Remove it to use what the run holds without knowing what it was made from."
        raise UsageError(f"{run / FILE} is not what mpq writes there. {again}") from None


def identity(path: Path) -> str:
    """The hash of a file's bytes; of a policy, of all in it that decides what becomes of a network.

    Raises:
        PolicyError: it is a policy that cannot be read.
        OSError: it cannot be read.
    """
    if path.suffix == ".yaml":
        return digest(_policy(path))
    found = path.stat()
    hashed = _hash if found.st_size > LARGE else _hash.__wrapped__
    return hashed(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino)


def _policy(path: Path) -> Policy:
    """A policy, which is read once as long as it stays: that of a large network takes a second."""
    if not path.is_file():
        return Policy.load(path)  # which says so
    found = path.stat()
    return _load(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=64)
def _load(path: Path, *_: int) -> Policy:
    """A policy as it was at a time."""
    return Policy.load(path)


@lru_cache(maxsize=64)
def _hash(path: Path, *_: int) -> str:
    """The hash of a file as it was at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(policy: Policy) -> str:
    """The hash of a policy, whatever its comments, evidence, reasons and budgets."""
    told = {"evidence", "result", "constraints"}
    layers: dict[str, Any] = {"__all__": {"reason", "locked"}}
    data = policy.model_dump(mode="json", exclude={**dict.fromkeys(told, True), "layers": layers})
    if policy.model and policy.model.sha256:
        del data["model"]["checkpoint"]  # where it lies does not matter
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def require(path: Path) -> None:
    """Refuse a file of a run that was made from something that the run holds no more.

    A file of which nothing is known, or which is not what mpq wrote there, is the user's own.

    Raises:
        UsageError: it is stale; the message names both sides and the command that mends it.
    """
    reason = _stale(path.parent, path.name, origins(path.parent))
    if reason is not None:
        raise UsageError(reason + _instead(path))


def _instead(path: Path) -> str:
    """The quantized network that is not stale, where the one that a file was made from is."""
    run = path.parent
    found = newest(run, [name for name in rundir.QUANTIZED if name != path.name])
    if path.name in rundir.QUANTIZED or found is None or _stale(run, found.name, origins(run)):
        return ""
    if found.name == made_of(path, rundir.QUANTIZED):
        return ""
    return f". Or take {found}, which is not stale: mpq export {run} --force"


def doubt(path: Path) -> str | None:
    """Why what a file of a run says must not be shown as being of this run; None if it may."""
    run, name, known = path.parent, path.name, origins(path.parent)
    if known and (name not in known or known[name].sha256 != identity(path)):
        return f"{path} is not what mpq wrote there. Make it anew: {_again(run, name, known)}"
    return _stale(run, name, known)


def newest(run: Path, names: Sequence[str]) -> Path | None:
    """Of several files of a run the one made last that is not stale; if all are, the last of them.

    Returns:
        None if there is none of them.
    """
    known = origins(run)
    order = {name: place for place, name in enumerate(known)}
    there = [name for name in names if (run / name).is_file()]
    there.sort(key=lambda name: (order.get(name, -1), (run / name).stat().st_mtime_ns))
    fresh = [name for name in there if _stale(run, name, known) is None]
    return run / (fresh or there)[-1] if there else None


def made_of(path: Path, names: Sequence[str]) -> str | None:
    """Which of several files of its run a file was made from; None if that is not known."""
    found = origins(path.parent).get(path.name)
    return next((name for name in names if found and name in found.made_from), None)


def find_quantized(path: Path, stage: str | None = None) -> Path:
    """The quantized network that a path means: the file itself, or that of a run.

    Args:
        path: a file, a run, or another file of a run.
        stage: `ptq` or `qat`; None: the newest that is not stale.

    Raises:
        UsageError: the run holds none, or none of that stage.
    """
    folder = rundir.run_folder(path)
    if not folder.is_dir() or (path.name in rundir.QUANTIZED and stage is None):
        return path
    names = rundir.QUANTIZED if stage is None else (rundir.STAGES[stage],)
    found = newest(folder, names)
    if found is None:
        what, commands = " nor ".join(names[-2:]), " or ".join(f"`mpq {n[:3]}`" for n in names[-2:])
        raise UsageError(
            f"{folder} must hold a quantized network, but has no {what}. Run {commands} there "
            "first, or name the file."
        )
    return found


def network_of(path: Path) -> Path:
    """The quantized network that an ONNX file beside it was made from, as far as is known.

    Raises:
        UsageError: there is none beside it.
    """
    name = made_of(path, rundir.QUANTIZED)
    if name is not None and (path.parent / name).is_file():
        return path.parent / name
    return find_quantized(path.parent)


def is_of(path: Path, name: str) -> bool:
    """Whether a file of a run is of that other file of it, as far as is known."""
    found = origins(path.parent).get(path.name)
    return found is None or name in found.made_from


def _stale(run: Path, name: str, known: Mapping[str, Origin]) -> str | None:
    """Follow a file back to where it was made from something else than what is there now."""
    found = known.get(name)
    if found is None or not (run / name).is_file() or found.sha256 != identity(run / name):
        return None
    for source, then in found.made_from.items():
        now = _now(run, source)
        if now is not None and now != then:
            return _told(run, name, source, (then, now), known)
        deeper = _stale(run, source, known) if now is not None and source in known else None
        if deeper is not None:
            return deeper
    return None


def _now(run: Path, source: str) -> str | None:
    """What a source is now; None where that is not known, and so cannot contradict."""
    if source == WEIGHTS:
        policy = _policy(run / POLICY) if (run / POLICY).is_file() else None
        return (policy.model.sha256 or None) if policy and policy.model else None
    return identity(run / source) if (run / source).is_file() else None


def _told(
    run: Path, name: str, source: str, hashes: tuple[str, str], known: Mapping[str, Origin]
) -> str:
    then, now = (value[:8] for value in hashes)
    what = f"the weights that {run / POLICY} names" if source == WEIGHTS else str(run / source)
    return (
        f"{run / name} is stale: mpq {known[name].by} made it when {what} had the hash {then}..., "
        f"which is {now}... now. Make it anew: {_again(run, name, known)}"
    )


def _again(run: Path, name: str, known: Mapping[str, Origin]) -> str:
    by = known[name].by if name in known else "ptq"
    return AGAIN.get(name, "mpq {by}").format(run=run, by=by)
