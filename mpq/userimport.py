"""Code of the user's own, named `package.module:function` on the command line. No torch here.

A name is also what checkpoints, policies and ONNX files say of themselves, and whoever wrote them
may be anybody. So a name alone runs nothing: code is imported only if the user has trusted its name
(`trusting`), on this command line or earlier in the same run (`mpq.trusted`). What is trusted is a
value that holds for a block, as a working directory does, rather than an argument of all that may
come to read a file: code that was forgotten on the way is then refused, not run.

Modules are looked for in the working directory first, as `python -m` does and a console script
does not.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq.errors import MpqError, nearest
from mpq.trusted import is_name, recalled, remember


@dataclass(frozen=True)
class Trust:
    """Which code may be imported.

    Args:
        names: `package.module:function`, as the user wrote them.
        runs: folders whose memory of such names counts.
    """

    names: frozenset[str] = frozenset()
    runs: tuple[Path, ...] = ()

    def refusal(self, name: str) -> str | None:
        """Why the code of that name may not be imported, and what to type; None if it may."""
        if not is_name(name):
            return f"code must be named package.module:function. Got {name!r}."
        if name in self.names:
            return None
        known = [found for run in self.runs if (found := recalled(run, name)) is not None]
        if any(found.unchanged for found in known):
            return None
        if known and known[0].unchanged is None:
            file, module = Path(known[0].file), name.partition(":")[0]
            home = file.parents[module.count(".") + (file.stem == "__init__")]
            return (
                f"the module {module} of {name} must be importable from this folder or the "
                f"environment, but is not found. When trusted it lay in {file}: start mpq in "
                f"{home}, or put that folder on PYTHONPATH."
            )
        if known:
            return (
                f"{known[0].file} has changed since {name} was trusted, so it is not run again. "
                f"If that was you, add --trust-code {name}."
            )
        return (
            f"{name} is code that a file asks for and that you have not named, so it is not run. "
            f"If you know what it does, add --trust-code {name}."
        )


_NOTHING = Trust()
_trust: ContextVar[Trust] = ContextVar("trust", default=_NOTHING)


@contextlib.contextmanager
def trusting(*names: str) -> Iterator[None]:
    """Let code of these names be imported while the block runs, beside what is trusted already.

    What is trusted inside the block (`trust`, `trust_run`) is so until it ends.
    """
    token = _trust.set(_trust.get())
    try:
        trust(*names)
        yield
    finally:
        _trust.reset(token)


def trust(*names: str) -> None:
    """Trust code by name, as `package.module:function`; other names mean no code."""
    now = _trust.get()
    _trust.set(Trust(now.names | set(filter(is_name, names)), now.runs))


def trust_run(folder: Path) -> None:
    """Trust what the user has trusted in a run before."""
    now = _trust.get()
    _trust.set(Trust(now.names, (*now.runs, folder)))


def remember_trust(folder: Path) -> None:
    """Keep what is trusted in a run, so that its later stages need not name it again."""
    trust = _trust.get()
    remember(folder, trust.names, trust.runs)


class _Torchvision:
    """Finds nothing; where the user's code comes to import torchvision, it is made importable."""

    looking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """As a finder of `sys.meta_path`."""
        if name == "torchvision" and not self.looking:
            from mpq._torchvision import declare_missing  # needs torch, which nothing else does

            self.looking = True  # it looks for torchvision too
            declare_missing()


@contextlib.contextmanager
def working_directory() -> Iterator[None]:
    """Let imports see the working directory, and a torchvision that loads, while the block runs."""
    folder, finder = os.getcwd(), _Torchvision()
    sys.path.insert(0, folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        sys.meta_path.remove(finder)


def raised(error: BaseException) -> str:
    """What code of the user's raised, and its innermost line that is neither ours nor a library's.

    Returns:
        As in `ValueError: no such file, at mine.py:12: `open(path)``.
    """
    told = str(error)
    if told.startswith("Caught "):  # torch's loader has the worker's own traceback in words
        *_, told = told.strip().splitlines()
        return told
    ours = (str(Path(__file__).parent), str(Path(os.__file__).parent), "<")
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(ours) and "-packages" not in frame.filename
    ]
    place = f", at {lines[-1].filename}:{lines[-1].lineno}: `{lines[-1].line}`" if lines else ""
    return f"{type(error).__name__}: {told}{place}"


def import_callable(name: str, option: str, error: type[MpqError]) -> Callable[..., Any]:
    """The function or class under `package.module:function`; it is not called.

    Args:
        name: where it is.
        option: how the user names it, for messages: `--model`, `--data`.
        error: what to raise.

    Raises:
        MpqError: as `error`: it is not trusted, the module cannot be imported, or has no such
            callable.
    """
    refusal = _trust.get().refusal(name)
    if refusal:
        raise error(refusal)
    module_name, _, attribute = name.partition(":")
    try:
        with working_directory():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as reason:  # user code may raise anything
        raise error(
            f"the module {module_name!r} of {option} {name} must be importable from the working "
            f"directory or the environment. It raised {raised(reason)}"
        ) from reason
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        known = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise error(
            f"{option} {name} must name a function or class of {module_name}, which has no "
            f"callable {attribute!r}{nearest(attribute, known)}"
        )
    return found


def made_by(name: str, option: str, error: type[MpqError]) -> Any:
    """What the function under `package.module:function` gives; raises as `import_callable`."""
    factory = import_callable(name, option, error)
    try:
        with working_directory():
            return factory()
    except (Exception, SystemExit) as reason:  # user code may raise anything
        raise error(f"{option} {name} failed with {raised(reason)}") from reason
