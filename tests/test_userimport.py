"""Code of the user's own by its name: found in the working directory, refused in one way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpq.errors import DataError, UsageError
from mpq.userimport import import_callable, trusting, working_directory

MODULE = "code_of_somebody"


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / f"{MODULE}.py").write_text("def make(): return 7\nclass Kind: pass\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with trusting(*(f"{MODULE}:{name}" for name in ("make", "Kind", "mke", "number"))):
        yield


def test_what_nobody_has_trusted_is_not_even_imported():
    with pytest.raises(UsageError, match=f"--trust-code {MODULE}:other"):
        import_callable(f"{MODULE}:other", "--model", UsageError)
    assert MODULE not in sys.modules


def test_functions_and_classes_of_the_working_directory_are_found():
    before = list(sys.path)
    assert import_callable(f"{MODULE}:make", "--data", DataError)() == 7
    assert import_callable(f"{MODULE}:Kind", "--model", UsageError).__name__ == "Kind"
    assert sys.path == before


@pytest.mark.parametrize("error", [UsageError, DataError])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{MODULE}:mke", r"--model .* has no callable 'mke'; did you mean make\?"),
        (f"{MODULE}:number", r"has no callable 'number'"),
        (
            "absent_module:make",
            r"'absent_module' of --model .* must be importable from the working",
        ),
    ],
)
def test_what_is_not_there(name, message, error):
    with trusting("absent_module:make"), pytest.raises(error, match=message):
        import_callable(name, "--model", error)


def test_the_path_is_restored_after_a_failure():
    before = list(sys.path)
    with pytest.raises(KeyError), working_directory():
        {sys.path[0]: "found"}.pop(str(Path.cwd()) + "/elsewhere")
    assert sys.path == before
