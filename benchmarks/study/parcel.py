"""What travels to a GPU machine and back: files in order of their worth, as one stream in parts.

    python -m benchmarks.study.parcel pack PLAN RUNS OUT --bytes N     parts of at most N bytes
    python -m benchmarks.study.parcel open STORE FOLDER                all parts are there: unpack
    python -m benchmarks.study.parcel bring RUNS OUT --bytes N --total M
    python -m benchmarks.study.parcel merge BACK RUNS                  what was brought back

A part says in its name which it is of how many. The stream is a tar archive; its SHA-256 stands in
the name of its parts, so that parts of two streams never mix.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from benchmarks.study.plan import Plan, checkpoint_file
from benchmarks.study.shelf import BEGUN, DONE, PLAN
from mpq.errors import MpqError, UsageError

PART = re.compile(r"(?P<stream>[a-z]+-[0-9a-f]{12})\.(?P<number>\d\d)of(?P<count>\d\d)$")
Entry = tuple[str, Path]
"""Name in the stream, and the file."""


def data_files(plan: Plan) -> list[Entry]:
    """The archives of a plan's images and the checkpoints that it names.

    Raises:
        UsageError: the images do not lie as archives in `$MPQ_DATA`, or a checkpoint is missing.
    """
    checkpoints = [checkpoint_file(n.checkpoint) for n in plan.networks if n.checkpoint]
    entries = [(f"data/checkpoints/{p.name}", p) for p in checkpoints]
    if plan.data.name == "digits":
        return entries  # they come with scikit-learn
    root = Path(os.environ.get("MPQ_DATA", "."))
    images = sorted(root.glob(f"{plan.data.name}-*.zip"))
    if not images:
        raise UsageError(f"$MPQ_DATA ({root}) must hold {plan.data.name}-*.zip, but does not.")
    order = [p for p in (root / f"{plan.data.name}-order.csv.gz",) if p.is_file()]
    return entries + [(f"data/{p.name}", p) for p in (*images, *order)]


def worth(runs: Path) -> list[Entry]:
    """The files of a study's stages, what can least be done without first.

    What finished stages say and their small files; then networks; then trainings that go on; then
    what teachers answered. A float model file is left out: it is made again from its network.
    """
    ranked: list[tuple[int, int, str, Path]] = []
    for path in runs.rglob("*"):
        name = path.relative_to(runs).as_posix()
        if path.is_file() and not path.name.startswith(".") and not name.startswith("results/"):
            size = path.stat().st_size
            ranked.append((_rank(path, name), size, name, path))
    return [(name, path) for rank, _, name, path in sorted(ranked) if rank < _LEFT_OUT]


_LEFT_OUT = 9


def _rank(path: Path, name: str) -> int:
    if path.name in (DONE, BEGUN, PLAN) or path.suffix in (".jsonl", ".yaml", ".json"):
        return 0
    if name.startswith("answers/"):
        return 4
    if path.name == "model.onnx":
        return 1 if _quantized(path.parent / DONE) else _LEFT_OUT
    if path.name == "model.pth":
        return 2
    return 3 if (path.name in ("checkpoint.pth", "trained.pth")) and _open(path) else _LEFT_OUT


def _quantized(done: Path) -> bool:
    """Whether a finished row has another file than its float network's."""
    return done.is_file() and json.loads(done.read_text(encoding="utf-8"))["method"] != "float"


def _open(path: Path) -> bool:
    """Whether the stage of a training's state is not finished."""
    return not any((folder / DONE).is_file() for folder in list(path.parents)[:2])


def within(entries: Iterable[Entry], total: int) -> tuple[list[Entry], list[str]]:
    """The files that fit, in order, and the names of those that do not."""
    taken, left, used = [], [], 0
    for name, path in entries:
        need = 1024 + -(-path.stat().st_size // 512) * 512
        if used + need + 10240 <= total:
            taken.append((name, path))
            used += need
        else:
            left.append(name)
    return taken, left


def write_parts(kind: str, entries: Iterable[Entry], out: Path, size: int) -> list[Path]:
    """A tar stream of files, in parts of at most `size` bytes."""
    out.mkdir(parents=True, exist_ok=True)
    whole = out / f".{kind}.tar"
    with tarfile.open(whole, "w") as tar:
        for name, path in entries:
            tar.add(path, arcname=name, recursive=False, filter=_plain)
    digest = hashlib.sha256(whole.read_bytes()).hexdigest()[:12]
    count = max(1, -(-whole.stat().st_size // size))
    parts = []
    with whole.open("rb") as stream:
        for number in range(1, count + 1):
            part = out / f"{kind}-{digest}.{number:02}of{count:02}"
            part.write_bytes(stream.read(size))
            parts.append(part)
    whole.unlink()
    return parts


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from machine to machine."""
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    info.mode = 0o644
    return info


def unpack(parts: list[Path], folder: Path) -> None:
    """Unpack a stream of parts.

    Raises:
        UsageError: parts are missing or damaged, or of two streams.
    """
    streams = {m["stream"] for p in parts if (m := PART.search(p.name))}
    if len(streams) != 1:
        raise UsageError(f"parts must be of one stream. Got {sorted(streams) or 'none'}.")
    ordered = sorted(parts)
    last = PART.search(ordered[-1].name)
    content = b"".join(p.read_bytes() for p in ordered)
    digest = hashlib.sha256(content).hexdigest()[:12]
    (stream,) = streams
    if last is None or len(ordered) != int(last["count"]) or not stream.endswith(digest):
        raise UsageError(f"the {len(ordered)} parts of {stream} are not all of it, or damaged.")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(folder, filter="data")


def _streams(folder: Path) -> Iterator[list[Path]]:
    """The parts in a folder, by stream, the oldest first."""
    parts = [p for p in folder.iterdir() if PART.search(p.name)]
    names = {p.name.partition(".")[0]: p.stat().st_mtime_ns for p in parts}
    for stream in sorted(names, key=lambda name: names[name]):
        yield [p for p in parts if p.name.startswith(f"{stream}.")]


@click.group()
def main() -> None:
    """What travels to a GPU machine and back."""


@main.command("pack")
@click.argument("plan")
@click.argument("runs", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bytes", "size", type=int, required=True)
@click.option("--wheels", type=click.Path(path_type=Path, exists=True))
def _pack(plan: str, runs: Path, out: Path, size: int, wheels: Path | None) -> None:
    found = Plan.load(plan)
    entries = [(f"wheels/{p.name}", p) for p in sorted(wheels.glob("*.whl"))] if wheels else []
    entries += data_files(found)
    if runs.is_dir():
        entries += [(f"runs/{found.name}/{name}", path) for name, path in worth(runs)]
    for part in write_parts("parcel", entries, out, size):
        click.echo(f"{part} {part.stat().st_size}")


@main.command("open")
@click.argument("store", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def _open_store(store: Path, folder: Path) -> None:
    for parts in _streams(store) if store.is_dir() else ():
        unpack(parts, folder)
        for part in parts:  # once: what is made from here on is newer
            part.unlink()


@main.command("bring")
@click.argument("runs", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bytes", "size", type=int, required=True)
@click.option("--total", type=int, required=True)
def _bring(runs: Path, out: Path, size: int, total: int) -> None:
    new = [(name, path) for name, path in worth(runs) if path.stat().st_mtime]  # 0: from a parcel
    taken, left = within(new, total)
    for part in write_parts("back", taken, out, size):
        click.echo(f"{part} {part.stat().st_size}")
    for name in left:
        click.echo(f"left behind, too large: {name}")


@main.command("merge")
@click.argument("back", type=click.Path(path_type=Path, exists=True))
@click.argument("runs", type=click.Path(path_type=Path))
def _merge(back: Path, runs: Path) -> None:
    for parts in _streams(back):
        unpack(parts, runs)
    click.echo(f"{runs} has what was brought back")


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (MpqError, click.ClickException) as error:
        raise SystemExit(f"Error: {error}") from None
