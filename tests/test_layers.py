"""The layers of the package: imports point down only, and the light parts stay light."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import mpq
import mpq.export
import mpq.policies

PACKAGES = (mpq, mpq.export, mpq.policies)
ROOTS = {package.__name__: Path(str(package.__file__)).parent for package in PACKAGES}
LAYERS = {
    "mpq.errors": 0,
    "mpq.allocator": 0,
    "mpq.cpu": 0,
    "mpq.files": 1,
    "mpq.interrupts": 0,
    "mpq.limits": 1,
    "mpq.lock": 1,
    "mpq.staging": 1,
    "mpq.processes": 1,
    "mpq.threads": 0,
    "mpq.shown": 2,
    "mpq.spec": 1,
    "mpq.inputs": 1,
    "mpq.fields": 2,
    "mpq.verb": 0,
    "mpq.trusted": 2,
    "mpq.userimport": 2,
    "mpq.keys": 2,
    "mpq.policy": 2,
    "mpq.target": 2,
    "mpq.targets": 2,
    "mpq.latency": 2,
    "mpq.yamltext": 2,
    "mpq.wide": 2,
    "mpq.layers": 2,
    "mpq.compare": 2,
    "mpq.entries": 2,
    "mpq.rundir": 2,
    "mpq.origins": 2,
    "mpq.policies": 2,
    "mpq.hooks": 3,
    "mpq.axes": 3,
    "mpq.batch": 4,
    "mpq.calls": 3,
    "mpq.metrics": 5,
    "mpq.nonfinite": 3,
    "mpq.numerics": 3,
    "mpq.outputs": 3,
    "mpq.data": 3,
    "mpq.zoo": 3,
    "mpq.checkpoint": 3,
    "mpq._torchvision": 2,
    "mpq._torchfile": 3,
    "mpq.saved": 3,
    "mpq.quant": 4,
    "mpq.capture": 3,
    "mpq.graph": 5,
    "mpq.analyze": 6,
    "mpq.ptq": 6,
    "mpq.train": 6,
    "mpq.export": 7,
    "mpq.noise": 0,
    "mpq.diagnose": 7,
    "mpq.report": 8,
    "mpq.pipeline": 8,
    "mpq.api": 9,
    "mpq.cli": 9,
    "mpq.__main__": 9,
}
LIGHT = {"mpq.errors", "mpq.spec", "mpq.policy", "mpq.target", "mpq.targets", "mpq.layers",
         "mpq.latency", "mpq.data", "mpq.report", "mpq.rundir", "mpq.trusted",
         "mpq.userimport"}  # fmt: skip
"""What is of use where torch is absent."""
SIBLINGS = {"mpq.analyze", "mpq.ptq", "mpq.train"}


def modules() -> dict[str, Path]:
    found = {}
    for root, folder in ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((root, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def area(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to; empty for the root package."""
    return ".".join(module.split(".")[:2]) if "." in module else ""


@functools.cache
def imports(module: str) -> set[str]:
    """Every module that a module imports, wherever in the file, relative ones made absolute.

    Names under `if TYPE_CHECKING` count as well: a type is knowledge too.
    """
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from mpq.graph import ir` may name a module or a member of one.
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys()
            found |= {base} if names - MODULES.keys() else set()
    return found


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "mpq"}


def test_the_reader_of_imports_finds_them():
    assert "mpq.graph.ir" in own_imports("mpq.graph.annotate")
    assert "mpq.export.runtime" in own_imports("mpq.export.bench")
    assert "mpq.quant.ops" in own_imports("mpq.quant.layer")
    assert own_imports("mpq.spec") == set()
    assert "torch" in imports("mpq.numerics")
    assert len(MODULES) > 60


def test_imports_point_down():
    """The root package is left out: it imports nothing by itself, and others its version only."""
    pairs = [(m, n) for m in MODULES if m != "mpq" for n in own_imports(m) if n != "mpq"]
    assert {area(m) for m in MODULES if m != "mpq"} == LAYERS.keys()
    assert [(m, n) for m, n in pairs if LAYERS[area(n)] > LAYERS[area(m)]] == []


def test_siblings_and_export_know_no_other_sibling():
    wrong = {m: {area(n) for n in own_imports(m)} & SIBLINGS - {area(m)} for m in MODULES}
    bound = SIBLINGS | {"mpq.export"}
    assert {m: others for m, others in wrong.items() if area(m) in bound and others} == {}


def test_no_cycles():
    needs = {m: own_imports(m) - {"mpq", m} for m in MODULES if m != "mpq"}
    graphlib.TopologicalSorter(needs).prepare()  # a CycleError names the modules


def test_torch_and_onnxruntime_stay_where_they_belong():
    outside = {m: {name.split(".")[0] for name in imports(m)} for m in MODULES}
    # Programs for another Python, imported nowhere.
    alone = {f"mpq.export.runners.{name}" for name in ("onnxruntime_job", "probe")}
    assert not alone & {name for m in MODULES for name in own_imports(m)}
    users = {m for m, names in outside.items() if "onnxruntime" in names}
    assert users - alone == {"mpq.export.runtime"}
    assert [m for m, names in outside.items() if area(m) in LIGHT and "torch" in names] == []


@pytest.mark.parametrize(
    "names",
    [
        "mpq.cli, mpq.export.bench",
        "mpq.policy, mpq.target, mpq.layers",
        "mpq.data, mpq.report",
        "mpq.diagnose",
    ],
)
def test_light_parts_do_not_load_torch(names: str):
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode() or "torch was loaded"


def test_bench_help_does_not_load_torch():
    code = (
        "import sys\n"
        "from mpq.cli import main\n"
        "sys.argv = ['mpq', 'bench', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    assert b"Usage: " in result.stdout


def test_public_names_are_found_at_their_home():
    found = [getattr(mpq, name) for name in dir(mpq) if name != "__version__"]
    assert {getattr(value, "__module__", value.__name__) for value in found} <= MODULES.keys()
    with pytest.raises(AttributeError, match="module 'mpq' has no attribute 'nothing'"):
        mpq.nothing  # noqa: B018
