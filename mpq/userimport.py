"""Code of the user's own, named `package.module:function` on the command line. No torch here.

Modules are looked for in the working directory first, as `python -m` does and a console script
does not.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mpq.errors import MpqError, nearest


@contextlib.contextmanager
def working_directory() -> Iterator[None]:
    """Let imports see the working directory while the block runs."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def import_callable(name: str, option: str, error: type[MpqError]) -> Callable[..., Any]:
    """The function or class under `package.module:function`; it is not called.

    Args:
        name: where it is.
        option: how the user named it, for messages: `--model`, `--data`.
        error: what to raise.

    Raises:
        MpqError: as `error`: the module cannot be imported, or has no such callable.
    """
    module_name, _, attribute = name.partition(":")
    try:
        with working_directory():
            module = importlib.import_module(module_name)
    except Exception as reason:  # user code may raise anything
        raise error(
            f"the module {module_name!r} of {option} {name} must be importable from the working "
            f"directory or the environment. It raised {type(reason).__name__}: {reason}"
        ) from reason
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise error(
            f"{option} {name} must name a function or class of {module_name}, which has no "
            f"callable {attribute!r}{nearest(attribute, known)}"
        )
    return found  # type: ignore[no-any-return]
