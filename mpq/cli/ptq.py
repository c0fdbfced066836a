"""`mpq ptq`: quantize by a policy, without training."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpq import rundir
from mpq.cli import options
from mpq.pipeline.quantizing import check_policy_file, keep_policy, run_ptq, save_quantized
from mpq.pipeline.subject import Source, policy_subject
from mpq.policy import Policy
from mpq.ptq import EFFORTS, METHODS


@click.command()
@options.policy
@options.data
@options.data_root
@click.option("--calibration", type=click.Choice(METHODS), default="mse", show_default=True,
              help="How activation ranges are chosen.")  # fmt: skip
@click.option("--effort", type=click.Choice(EFFORTS), default="good", show_default=True,
              help="fast: ranges only; good: also rounding and bias correction.")  # fmt: skip
@click.option("--num-calib", metavar="COUNT", type=click.IntRange(min=1),
              help="Training images to calibrate on.  [default: the policy's]")  # fmt: skip
@options.seed
@options.trust_pickle
@options.as_json
@options.force
@options.out("Run folder to write to.  [default: the policy's]")
def ptq(
    policy_path: Path | None,
    data: str | None,
    data_root: Path | None,
    calibration: str,
    effort: str,
    num_calib: int | None,
    seed: int,
    trust_pickle: bool,
    as_json: bool,
    force: bool,
    out: Path | None,
) -> None:
    """Quantize the model of a policy without training; write quantized.pth.

    \b
    mpq ptq
    mpq ptq --policy p.yaml --effort fast
    """
    path = options.in_run(policy_path, "policy.yaml")
    policy = Policy.load(path)
    folder = options.run_of(path, out)
    written = folder / "quantized.pth"
    rundir.refuse_overwrite(written, force)
    check_policy_file(path, folder, force=force)
    if num_calib:
        policy = policy.model_copy(
            update={"data": policy.data.model_copy(update={"samples": num_calib})}
        )
    source = Source(data, data_root)
    subject = policy_subject(policy, path, source, weights=True, trust_pickle=trust_pickle)
    with options.bars() as tell:
        found = run_ptq(
            policy,
            subject,
            method=calibration,  # type: ignore[arg-type]
            effort=effort,  # type: ignore[arg-type]
            seed=seed,
            progress=tell,
        )
    save_quantized(found, written)
    keep_policy(path, folder)
    if as_json:
        click.echo(json.dumps({"file": str(written), **found.metrics}))
    else:
        options.show(
            f"top-1 {found.metrics['validation_top1']:.2f} % on a sample of the validation split, "
            "simulated"
        )
    options.say(f"wrote {written}; next: mpq export --onnx")
