"""Packages that can be called: `mpq.analyze` is a verb of the API, and a package with its parts.

So `mpq.analyze(model, data)` and `from mpq.analyze import Search` both mean what they say.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, cast


class Verb(ModuleType):
    """A package that does, when called, what the function of its name in `mpq.api` does."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As `mpq.api` has it."""
        return _function(self)(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self))


def callable_package(name: str) -> None:
    """Make the package of that name, which is being imported, a `Verb`."""
    sys.modules[name].__class__ = Verb


def _function(package: ModuleType) -> Callable[..., Any]:
    name = package.__name__.rpartition(".")[2]
    return cast(Callable[..., Any], getattr(import_module("mpq.api"), name))
