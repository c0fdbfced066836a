"""`Shown`: a result that prints itself, shows itself in a notebook, and is kept in a file.

Tables are made in `mpq.report`, above what they show: it is imported when something is printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError

from mpq import files
from mpq.errors import UsageError


class Shown:
    """Base of results: `print(result)`, `result` in a notebook, `result.save(path)`, `load(path)`.

    A child says which functions of `mpq.report.tables` show what its `to_json` holds.
    """

    TABLES: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> Any:
        """Its content: the text of a JSON file, or what becomes one."""
        raise NotImplementedError

    def shown(self) -> Iterable[Any]:
        """The tables and lines that it is printed as."""
        content, tables = _loaded(self.to_json()), import_module("mpq.report.tables")
        return [getattr(tables, name)(content) for name in self.TABLES]

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, replacing what is there."""
        files.write_json(Path(path), _loaded(self.to_json()))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is missing, or holds something else.
        """
        try:
            return TypeAdapter(cls).validate_json(Path(path).read_bytes())
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise UsageError(
                f"{path} must hold a {cls.__name__}. It does not: {error.errors()[0]['msg']}."
            ) from None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        text: str = import_module("mpq.report.grid").plain(self.shown())
        return text

    def _repr_html_(self) -> str:
        html: str = import_module("mpq.report.grid").html(self.shown())
        return html


def _loaded(content: Any) -> Any:
    return json.loads(content) if isinstance(content, str) else content
