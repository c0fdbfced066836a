"""`mpq ptq`: quantize by a policy, without training."""

from __future__ import annotations

from pathlib import Path

import click

from mpq import rundir
from mpq.cli import bundles, ends, options, places, terminal
from mpq.data import DataSource
from mpq.pipeline.anything import Wanted
from mpq.pipeline.given import with_wishes
from mpq.pipeline.guard import check_start
from mpq.pipeline.quantizing import begin_policy, check_policy_file, run_ptq, save_quantized
from mpq.pipeline.subject import policy_subject
from mpq.pipeline.wishes import Wishes
from mpq.policy import OutputKind, Policy
from mpq.ptq import (
    EFFORTS,
    EQUALIZE,
    MEMORY_MB,
    METHODS,
    Effort,
    Equalize,
    Learning,
    Method,
    PtqSettings,
)
from mpq.ptq.blockwise import PROGRESS
from mpq.rundir import Run
from mpq.wide import Int16Form


@click.command()
@bundles.policy
@bundles.source
@bundles.wishes
@options.choice("--calibration", METHODS, default="mse", help="How activation ranges are chosen.")
@options.choice("--effort", EFFORTS, default="good",
                help="fast: ranges and biases; good: also rounding with error feedback, seconds; "
                "best: also learned rounding, minutes.")  # fmt: skip
@options.choice("--equalize", EQUALIZE, default="auto",
                help="Rescale channels between layers: where it clearly pays, wherever it does, "
                "never.")  # fmt: skip
@options.count("--iterations", default=Learning.iterations,
               help="Steps per block of --effort best.")  # fmt: skip
@options.num_calib("the policy's")
@options.count("--memory-mb", metavar="MB", default=MEMORY_MB,
               help="Activations to hold in memory; more lie in temporary files.")  # fmt: skip
@click.option("--dynamic", is_flag=True,
              help="Linear layers that read floats (after norms, attention, GELU) take their "
              "range at run time: for transformers.")  # fmt: skip
@options.int16_form
@ends.outputs
@options.seed
@options.trust_pickle
@options.as_json
@options.force
@options.resume
@options.out("Run folder to write to.  [default: the policy's]")
def ptq(
    policy_path: Path,
    source: DataSource,
    wishes: Wishes,
    calibration: Method,
    effort: Effort,
    equalize: Equalize,
    iterations: int,
    num_calib: int | None,
    memory_mb: int,
    dynamic: bool,
    int16_form: Int16Form | None,
    outputs: dict[str, OutputKind],
    seed: int,
    trust_pickle: bool,
    as_json: bool,
    force: bool,
    resume: bool,
    out: Path | None,
) -> None:
    """Quantize the network of a policy without training; write ptq.pth.

    An interrupted --effort best goes on with --resume and ends as if it had not been interrupted.

    \b
    mpq ptq
    mpq ptq p.yaml --effort best
    mpq ptq runs/vit --dynamic
    """
    path = policy_path
    policy = asked = Policy.load(path)
    folder = places.hold(places.run_of(path, out))
    written = folder / rundir.STAGES["ptq"]
    resume = check_start(folder, written, resume=resume, force=force, state=PROGRESS)
    check_policy_file(path, folder, force=force or resume)
    if num_calib:
        policy = policy.replace(data=policy.data.replace(samples=num_calib))
    policy = policy.with_outputs(outputs)
    subject = policy_subject(policy, path, source, weights=True, trust_pickle=trust_pickle)
    subject = with_wishes(subject, wishes, Wanted(policy.data.samples or 512, seed=seed))
    if effort == "best":
        begin_policy(path, folder)
    settings = PtqSettings(
        method=calibration,
        effort=effort,
        equalization=equalize,
        learning=Learning(iterations=iterations),
        memory_mb=memory_mb,
        dynamic=dynamic,
        int16_form=int16_form,
    )
    with terminal.bars() as progress:
        run = Run(folder, seed, resume=resume, progress=progress)
        found = run_ptq(policy, subject, settings, run)
    save_quantized(found, written, path, asked)
    (folder / PROGRESS).unlink(missing_ok=True)  # the run is complete
    terminal.result(as_json, {"file": str(written), **found.metrics}, *found.measured)
    terminal.say(f"wrote {written}; next: mpq export")
    terminal.hint(folder)
