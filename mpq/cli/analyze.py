"""`mpq analyze`: sensitivity and policy of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpq import rundir
from mpq.analyze.score import METRICS
from mpq.cli import options
from mpq.data import Normalization
from mpq.pipeline.analyzing import find_policy, write_analysis
from mpq.pipeline.subject import Source, open_checkpoint
from mpq.policy import Constraints, Policy
from mpq.report.tables import sensitivity_table


@click.command(cls=options.ListCommand)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@options.model
@options.data
@options.data_root
@options.normalize
@options.widths("--bits", "8,4", "Weight widths to choose from.")
@options.widths("--act-bits", "8", "Activation widths to choose from.")
@options.limit("--effective-bits", "Mean bits per weight.  [default: 4.8 without other limits]")
@options.limit("--max-size-mb", "Size of the file in MB (10^6 bytes).")
@options.limit("--max-bops", "10^9 BitOps per image (MACs x weight bits x activation bits).")
@click.option("--metric", type=click.Choice(METRICS), default=METRICS[0], show_default=True,
              help="How layers are scored.")  # fmt: skip
@click.option("--num-score", metavar="COUNT", type=click.IntRange(min=1), default=512,
              show_default=True, help="Training images to score on.")  # fmt: skip
@click.option("--input-size", metavar="PIXELS", type=click.IntRange(min=8),
              help="Image side, if not the usual one.")  # fmt: skip
@click.option("--locked", type=click.Path(path_type=Path), metavar="POLICY",
              help="Keep the locked layers of this policy.")  # fmt: skip
@options.seed
@options.trust_pickle
@options.as_json
@options.force
@options.out()
def analyze(
    checkpoint: Path,
    model: str | None,
    data: str | None,
    data_root: Path | None,
    normalize: Normalization | None,
    bits: tuple[int, ...],
    act_bits: tuple[int, ...],
    effective_bits: float | None,
    max_size_mb: float | None,
    max_bops: float | None,
    metric: str,
    num_score: int,
    input_size: int | None,
    locked: Path | None,
    seed: int,
    trust_pickle: bool,
    as_json: bool,
    force: bool,
    out: Path | None,
) -> None:
    """Find how many bits each layer of CHECKPOINT needs; write policy.yaml.

    \b
    mpq analyze model.pth
    mpq analyze resnet20.pth --data cifar10 --effective-bits 4.8 -o runs/r20
    mpq analyze resnet20.pth --data cifar10 --bits 16,8,4 --max-size-mb 0.4
    mpq analyze model.pth --data none            weights only, no images
    """
    folder = rundir.resolve_out(out, checkpoint.stem)
    rundir.refuse_overwrite(folder / "policy.yaml", force)
    constraints = Constraints(
        effective_bits=effective_bits, max_size_mb=max_size_mb, max_bops=max_bops
    )
    subject = open_checkpoint(
        checkpoint,
        Source(data, data_root),
        arch=model,
        normalize=normalize,
        trust_pickle=trust_pickle,
        input_size=input_size,
    )
    options.say(
        f"{checkpoint}: {subject.info.arch}, {subject.info.classes} classes, data "
        f"{subject.data_name}, normalization {subject.info.normalize or 'unknown'}"
    )
    with options.bars() as tell:
        found = find_policy(
            subject,
            constraints,
            bits=bits,
            act_bits=act_bits,
            metric=metric,  # type: ignore[arg-type]
            samples=num_score,
            seed=seed,
            locked=Policy.load(locked) if locked else None,
            progress=lambda done, total: tell("scoring", done, total),
        )
    write_analysis(found, folder, force=force)
    result = found.policy.result
    assert result is not None
    written = folder / "policy.yaml"
    if as_json:
        told = result.model_dump(mode="json", exclude_none=True)
        click.echo(json.dumps({"file": str(written), **told}))
        return
    shown = found.sensitivity.to_json()
    shown["chosen"] = {name: list(pair) for name, pair in found.allocation.widths.items()}
    options.stdout.print(sensitivity_table(shown))
    options.show(
        f"{result.status}: {result.effective_bits:.2f} effective bits, "
        f"{result.weight_bytes:,} bytes of weights, file of about {result.predicted_bytes:,}"
    )
    options.say(f"wrote {written}; next: mpq ptq, or mpq qat --teacher ens.pth")
