"""How a policy file is laid out, so that it can be read, edited and diffed, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import ValidationError

from mpq import limits
from mpq.errors import MpqError, nearest


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
    """The message of an error without its line breaks; of YAML where it is and what is wrong."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        at, begin = error.problem_mark, error.context_mark
        inside = f", {error.context} of line {begin.line + 1}" if begin else ""
        return f"line {at.line + 1}, column {at.column + 1}: {error.problem}{inside}"
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """Gives up as soon as there are too many values, rather than when all are in memory."""

    count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.count += 1
        if self.count > limits.current().yaml_values:
            raise yaml.YAMLError(limits.exceeded("it", "yaml_values", "more values"))
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def load(text: str) -> object:
    """`yaml.safe_load` of a text that may come from anybody.

    Raises:
        yaml.YAMLError: it is no YAML, names a key of a mapping twice, is nested too deeply, or has
            more values than the limit, those that an alias repeats counted each time.
    """
    most = limits.current().text_mb * 1e6
    if len(text) > most:
        raise yaml.YAMLError(limits.exceeded("it", "text_mb", f"it has {len(text) / 1e6:.1f} MB"))
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root, {})
        return loader.construct_document(root)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date or a number that cannot be
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def mapping(text: str, where: str, error: type[MpqError], example: str) -> dict[Any, Any]:
    """`load` of a text that must be a mapping; `where` and `example` go into the message."""
    try:
        values = load(text)
    except yaml.YAMLError as wrong:
        raise error(f"{where} is not valid YAML: {one_line(wrong)}") from None
    if not isinstance(values, dict):
        raise error(
            f"{where} must be a YAML mapping {example}. Got {type(values).__name__} instead."
        )
    return values


def _check(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node stands for; refuses repeated keys and too many values."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = 1  # of one that contains itself
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            below += (key, value)
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line} gives the key {key.value!r} a second time")
            seen.add((key.tag, str(key.value)) if isinstance(key, yaml.ScalarNode) else id(key))
    elif isinstance(node, yaml.SequenceNode):
        below += node.value
    total = 1 + sum(_check(child, counted) for child in below)
    if total > limits.current().yaml_values:
        raise yaml.YAMLError(limits.exceeded("it", "yaml_values", f"{total:,} values or more"))
    counted[id(node)] = total
    return total


def explain(error: ValidationError, where: str, known: Iterable[str]) -> str:
    """What is wrong with a policy, key by key, with the nearest known keys."""
    lines = []
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"] if not str(p).startswith("function-"))
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            lines.append(f"{path} is not a known key{nearest(key, known)}")
        elif item["type"] == "missing":
            lines.append(f"{path} is missing.")
        elif item["type"] == "value_error":
            lines.append(f"{path}: {item['ctx']['error']}")
        else:
            lines.append(f"{path}: {item['msg']}. Got {item['input']!r} instead.")
    return f"{where} is not a valid policy: " + " ".join(dict.fromkeys(lines))
