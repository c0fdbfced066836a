"""What is installed: an sdist that holds all it needs, and a wheel that works outside the checkout.

The long form, with a fresh environment and `mpq demo`, is `make test-install`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import mpq

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "mpq", "export", "policies")
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
WALK = """
import importlib, pkgutil, sys
import mpq, mpq.export, mpq.policies
for package in (mpq, mpq.export, mpq.policies):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
files = {m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "mpq"}
outside = [f for f in files if f and not f.startswith(sys.argv[1])]
sys.exit(f"not from the wheel: {outside}" if outside else 0)
"""


def run(*command: str, cwd: Path, site: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if site is not None:
        env["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, built from the sdist as a downloader has it."""
    pytest.importorskip("setuptools", minversion="77", reason="builds with setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in NEEDED:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    run("-c", BUILD, "build_sdist", str(folder), cwd=source)
    (archive,) = folder.glob("mpq_compiler-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    run("-c", BUILD, "build_wheel", str(folder), cwd=unpacked)
    (wheel,) = folder.glob("mpq_compiler-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package(site: Path) -> None:
    held = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()}
    for top, inside in (("mpq", "mpq"), ("export", "mpq/export"), ("policies", "mpq/policies")):
        files = (p for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        wanted = {f"{inside}/{p.relative_to(ROOT / top).as_posix()}" for p in files}
        assert len(wanted) > 4
        assert wanted - held == set()
    assert "mpq/py.typed" in held
    assert {name.partition("/")[0].partition("-")[0] for name in held} == {"mpq", "mpq_compiler"}


def test_every_module_loads_from_the_wheel_alone(site: Path, tmp_path: Path) -> None:
    run("-c", WALK, str(site), cwd=tmp_path, site=site)


def test_the_doctor_of_the_wheel(site: Path, tmp_path: Path) -> None:
    found = json.loads(run("-m", "mpq", "doctor", "--json", cwd=tmp_path, site=site))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["mpq"] == mpq.__version__
    assert len(found["versions"]) == len(project["dependencies"])
    assert None not in found["versions"].values()
    assert [m for m in found["missing"] if m["mend"].startswith("pip install")] == []
    assert list(tmp_path.iterdir()) == []


def test_a_python_that_the_project_names_is_tested_by_the_workflow() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if ":: Python :: 3." in c]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["check"]
    assert job["strategy"]["matrix"]["python"] == named
    assert [s["run"] for s in job["steps"] if "run" in s] == [".ci/run", "make test-install"]


def test_the_citation_has_the_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == mpq.__version__
    assert f"## [{cited['version']}] - {cited['date-released']}" in (
        ROOT / "CHANGELOG.md"
    ).read_text(encoding="utf-8")
