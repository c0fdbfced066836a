"""`diagnose`: what the files of a run, or the results of stages, show."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpq import files, origins
from mpq.data import DataSource
from mpq.diagnose import Diagnosis, Facts, findings
from mpq.diagnose.tensors import IMAGES, measure
from mpq.errors import DataError, MpqError, UsageError
from mpq.export.certify import Certificate
from mpq.export.onnx_file import ExportResult
from mpq.pipeline.analysis import Analysis
from mpq.pipeline.benching import Bench
from mpq.pipeline.subject import policy_subject

logger = logging.getLogger(__name__)
TENSORS = "tensors.json"
Result = Analysis | ExportResult | Certificate | Bench
SCORED = (8, 4)
"""Widths that weights are looked at in where nothing says which were scored."""


def diagnose_run(
    folder: Path, source: DataSource | None = None, *, trust_pickle: bool = False
) -> Diagnosis:
    """Diagnose a run and write `diagnosis.json` into it.

    Where the tensors of the network have not been looked at, they are: the checkpoint that the
    policy names is read, and 64 training images if there are data.

    Args:
        folder: the run.
        source: of the images; None: as the policy says.
        trust_pickle: load a checkpoint that can run code.

    Raises:
        UsageError: it holds nothing of a run, or a file that is not what it should be.
        PolicyError: `policy.yaml` is none.
    """
    facts = Facts.of(folder)
    if facts.policy is not None and facts.tensors is None:
        tensors = _tensors(facts, folder, source or DataSource(None), trust_pickle)
        if tensors is not None:
            _keep(folder, TENSORS, tensors)
            facts = Facts.of(folder)
    if not facts.looked_at:
        raise UsageError(f"{folder} holds nothing of a run. Name one, as mpq analyze writes it.")
    found = findings(facts)
    _keep(folder, "diagnosis.json", found.to_json())
    return found


def diagnose_results(results: Sequence[Result]) -> Diagnosis:
    """Diagnose what stages gave, in any order; nothing is written."""
    facts = Facts()
    for one in results:
        facts = replace(facts, **_said(one))
    names = {"policy": "policy.yaml", "bench": "bench.jsonl"}
    known = ("policy", "sensitivity", "tensors", "validation", "certificate", "bench")
    looked = tuple(names.get(name, f"{name}.json") for name in known if getattr(facts, name))
    return findings(replace(facts, looked_at=looked))


def _said(one: Result) -> dict[str, Any]:
    if isinstance(one, Analysis):
        truth = one.validation and one.validation.to_json()
        return {
            "policy": one.policy,
            "sensitivity": one.to_json(),
            "tensors": one.tensors,
            "validation": truth,
        }
    if isinstance(one, Bench):
        return {"bench": one.to_json()}
    certificate = one.certificate if isinstance(one, ExportResult) else one
    return {"certificate": json.loads(certificate.to_json())}


def _tensors(
    facts: Facts, folder: Path, source: DataSource, trust_pickle: bool
) -> dict[str, Any] | None:
    """What there is to see in the network of a run; None, said aloud, where it cannot be read."""
    path = folder / "policy.yaml"
    assert facts.policy is not None
    scored = {bits for _, part, bits in facts.scores if part == "weight"}
    try:
        try:
            subject = policy_subject(facts.policy, path, source, weights=True,
                                     trust_pickle=trust_pickle)  # fmt: skip
        except DataError as error:
            logger.warning("activations are not looked at: %s", error)
            source = replace(source, data="none")
            subject = policy_subject(facts.policy, path, source, weights=True,
                                     trust_pickle=trust_pickle)  # fmt: skip
        images = None if subject.data is None else subject.sample(IMAGES, 0, "diagnosis")
        return measure(
            subject.graph(), images, sorted(scored or SCORED, reverse=True), facts.policy
        )
    except MpqError as error:
        logger.warning("weights and activations are not looked at: %s", error)
        return None


def _keep(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Put an answer into the run, unless it is there already."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    path = folder / name
    if path.is_file() and path.read_text(encoding="utf-8") == text and not origins.doubt(path):
        return
    if not (folder / origins.FILE).is_file():  # a run of an earlier version, which notes nothing
        files.write_text(path, text)
        return
    there = [folder / one for one in ("policy.yaml", "model.onnx") if (folder / one).is_file()]
    sources = there[:1] if name == TENSORS else there
    origins.keep(folder, name, text, "diagnose", sources)
