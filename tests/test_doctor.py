"""`mpq doctor`: what it says of packages, data and threads, seen from computers that lack some."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from mpq.cli import main
from mpq.pipeline import doctor
from mpq.pipeline.doctor import Missing, examine


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """What pip says, to be changed; and an empty working directory."""
    versions = {"torch": "2.13.0", "scipy": "1.17.1", "click": "8.5.1"}
    asked = ["torch<2.14,>=2.11", "scipy>=1.11", "click>=8.1", 'pytest>=8; extra == "dev"']

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda _: asked)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("MPQ_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return versions


def missing(what: str) -> list[Missing]:
    return [one for one in examine().missing if one.what.startswith(what)]


def test_nothing_is_said_of_what_is_there() -> None:
    assert examine().versions == {"torch": "2.13.0", "scipy": "1.17.1", "click": "8.5.1"}
    assert [m for what in ("torch", "scipy", "click", "pytest") for m in missing(what)] == []


def test_a_package_that_is_absent_names_its_commands_and_its_line(
    installed: dict[str, str],
) -> None:
    del installed["scipy"], installed["click"]
    assert missing("scipy") == [Missing("scipy", "analyze, rank", 'pip install "scipy>=1.11"')]
    assert [one.needed_for for one in missing("click")] == ["every command"]
    assert examine().versions["scipy"] is None


def test_a_version_that_does_not_do(installed: dict[str, str]) -> None:
    installed["torch"] = "2.8.0"
    (found,) = missing("torch")
    assert found.what == "torch<2.14,>=2.11 (here: 2.8.0)"
    assert found.mend == 'pip install "torch<2.14,>=2.11"'


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_load_error", lambda m: "OSError: libcudart.so" if m == "torch" else None
    )
    monkeypatch.setattr(doctor, "_gpu", lambda: None)
    (found,) = missing("torch")
    assert found.what == "torch that loads (OSError: libcudart.so)"
    assert found.mend.endswith("--force-reinstall")


def test_data_that_are_there_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one.needed_for for one in missing("the data")] == ["--data cifar10", "--data cifar100"]
    for split in ("train", "test"):
        for label in range(10):
            place = tmp_path / "cifar10" / split / f"class{label}"
            place.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(place / "0.png")
    assert examine().data == {"places": [str(tmp_path), "."], "found": ["digits", "cifar10"]}
    assert [one.needed_for for one in missing("the data")] == ["--data cifar100"]


def test_no_compiler_and_threads_that_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [one.mend for one in missing("a C++ compiler")] == ["apt install g++"]
    assert examine().threads["omp_num_threads"] == "3"


def test_the_command_prints_tables_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "This computer" in shown
    assert "What is missing" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {
        "mpq", "python", "versions", "cpu", "flags", "target", "integers", "gpu", "threads",
        "data", "cache", "missing",
    }  # fmt: skip
