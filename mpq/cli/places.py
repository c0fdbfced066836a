"""The runs that a command works in: which file of which run, and that nobody else writes there."""

from __future__ import annotations

from pathlib import Path

import click

from mpq import origins, rundir
from mpq.cli import terminal
from mpq.errors import UsageError
from mpq.userimport import trust_run


def hold(folder: Path) -> Path:
    """Be the only command that writes into a run, from here to the end of the command.

    Raises:
        UsageError: another one does.
    """
    click.get_current_context().with_resource(rundir.held(folder))
    return folder


def hold_file(path: Path) -> Path:
    """`hold` for a file that is no run's."""
    click.get_current_context().with_resource(rundir.held_file(path))
    return path


def in_run(path: Path | None, file: str) -> Path:
    """The file that a command works on, of a run, of a file in it, or of the newest run.

    Args:
        path: a file of that kind itself; a run, or another file of one; None: the newest run.
        file: its name in a run.

    Raises:
        UsageError: no run has one, or it is not of the quantized network that is named.
    """
    found = newest(file) / file if path is None else rundir.run_file(path, file)
    trust_run(found.parent)
    rundir.tidy(found.parent)
    if path is None:
        terminal.say(f"no file named: using {found}")
    elif path.name in rundir.QUANTIZED and found.suffix == ".onnx" and found.is_file():
        _refuse_other(found, path)
    return found


def onnx_file(path: Path | None, name: str = "model.onnx") -> Path:
    """`in_run` of an ONNX file, which must be there.

    Raises:
        UsageError: as `in_run`; it does not exist, or is a file of torch.
    """
    found = in_run(path, name)
    if not found.is_file():
        raise UsageError(f"{found} does not exist. Name an ONNX file, or a run that holds one.")
    with found.open("rb") as file:
        if file.read(2).startswith((b"PK", b"\x80")):  # an archive or a pickle
            raise UsageError(
                f"{found} must be an ONNX file. Got a checkpoint of torch, or another archive. "
                "Name the file that mpq export wrote, or its run."
            )
    return found


def _refuse_other(model: Path, network: Path) -> None:
    if not origins.is_of(model, network.name):
        raise UsageError(f"{model} was not made from {network}. Try mpq export {network} --force.")


def run(path: Path | None) -> Path:
    """The run that is named, by itself or by a file in it, or the newest one, said aloud.

    Raises:
        UsageError: there is none.
    """
    folder = newest("policy.yaml") if path is None else rundir.run_folder(path)
    if path is None:
        terminal.say(f"no run named: using {folder}")
    trust_run(folder)
    rundir.tidy(folder)
    return folder


def newest(*files: str) -> Path:
    """The newest run that has one of these files; one used later that has none is named aloud.

    Raises:
        UsageError: no run has one.
    """
    run, last = rundir.newest_run(*files), rundir.last_run()
    if last is not None and last != run:
        terminal.say(f"{last}, the run used last, has no {files[-1]}")
    return run


def policy_of(path: Path | None) -> Path | None:
    """The policy that says which network is meant; None where `path` is a network by itself."""
    if path is None:
        return run(None) / "policy.yaml"
    if path.suffix == ".yaml":
        trust_run(path.parent)
        return path
    folder = rundir.run_folder(path)
    inside = rundir.is_run(folder) or (folder / "profile.json").is_file()
    return run(folder) / "policy.yaml" if inside else None


def quantized(path: Path | None, origin: str | None) -> Path:
    """The quantized network to work on: of `path` as in `in_run`, as `--from` says; said aloud.

    Raises:
        UsageError: there is none, or two are named.
    """
    stage = origin if origin in rundir.STAGES else None
    if origin is not None and path is not None and path.suffix == ".pth":
        raise UsageError(f"{path} and --from {origin} name two networks. Give one of them.")
    wanted = rundir.QUANTIZED if stage is None else (rundir.STAGES[stage],)
    place = Path(origin) if origin and stage is None else path or newest(*wanted)
    folder = rundir.run_folder(place)
    trust_run(folder if folder.is_dir() else place.parent)
    rundir.tidy(folder)
    found = origins.find_quantized(place, stage)
    if found != path:
        terminal.say(f"using {found}" if path or origin else f"no file named: using {found}")
    return found


def run_of(policy: Path, out: Path | None) -> Path:
    """The run that a policy belongs to: `out`, its folder if that is a run, else `runs/STEM`.

    `policy-6.yaml` beside the `policy.yaml` of RUN belongs to a run of its own, `RUN-6`.
    """
    if out is None and rundir.is_run(policy.parent):
        if policy.name == "policy.yaml":
            return policy.parent
        if policy.name.startswith("policy-"):
            name = policy.parent.resolve().name + policy.stem.removeprefix("policy")
            return policy.parent.parent / name
    return rundir.resolve_out(out, policy.stem)
