"""What travels inside a file: the policy and its origin, as JSON under one metadata key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PureWindowsPath

from mpq import limits
from mpq.errors import PolicyError
from mpq.policy import Policy

KEY = "mpq"
"""Key of `metadata_props`."""


def to_metadata(policy: Policy) -> str:
    """The policy without evidence and reasons: what is needed to know the file, in few bytes.

    Of the checkpoint's path only the name travels: folders say something of their owner.
    """
    data = policy.model_dump(
        mode="json",
        exclude_none=True,
        exclude_defaults=True,
        exclude={"evidence": True, "groups": True, "layers": {"__all__": {"reason", "locked"}}},
    )
    if "checkpoint" in data.get("model", {}):
        data["model"]["checkpoint"] = PureWindowsPath(data["model"]["checkpoint"]).name
    return json.dumps({"policy": {"version": 1, **data}}, separators=(",", ":"))


def from_metadata(props: Mapping[str, str], where: str) -> Policy | None:
    """The policy of a file, or None if mpq did not make it.

    Raises:
        PolicyError: the entry is there but is not a policy.
    """
    if KEY not in props:
        return None
    text, most = props[KEY], limits.current().text_mb * 1e6
    if len(text) > most:
        got = f"it has {len(text) / 1e6:.1f} MB"
        raise PolicyError(limits.exceeded(f"the policy inside {where}", "text_mb", got))
    try:
        return Policy.model_validate(json.loads(text)["policy"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PolicyError(f"the policy inside {where} cannot be read: {error}") from None
