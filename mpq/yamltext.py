"""How a policy file is laid out, so that it can be read, edited and diffed line by line."""

from __future__ import annotations

import yaml


def section(key: str, value: object) -> str:
    """One top-level key; list items and small mappings in flow style, on one line each."""
    if isinstance(value, list) and value:
        return f"{key}:\n" + "".join(f"  - {_flow(v)}\n" for v in value)
    if key == "evidence" and isinstance(value, dict):
        return f"{key}:\n" + "".join(f"  {_flow(k)}: {_flow(v)}\n" for k, v in value.items())
    return f"{key}: {_flow(value)}\n"


def _flow(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())
