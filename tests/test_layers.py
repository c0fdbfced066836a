"""The layers of the package: imports point down only, and the light parts stay light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import mpq
import mpq.export

ROOTS = {"mpq": Path(mpq.__file__).parent, "mpq.export": Path(mpq.export.__file__).parent}
LAYERS = {
    "mpq.errors": 0,
    "mpq.allocator": 0,
    "mpq.cpu": 0,
    "mpq.files": 1,
    "mpq.processes": 1,
    "mpq.spec": 1,
    "mpq.userimport": 1,
    "mpq.policy": 2,
    "mpq.target": 2,
    "mpq.latency": 2,
    "mpq.yamltext": 1,
    "mpq.wide": 2,
    "mpq.layers": 2,
    "mpq.compare": 2,
    "mpq.rundir": 2,
    "mpq.policies": 2,
    "mpq.hooks": 3,
    "mpq.nonfinite": 3,
    "mpq.numerics": 3,
    "mpq.data": 3,
    "mpq.zoo": 3,
    "mpq.checkpoint": 3,
    "mpq._torchvision": 3,
    "mpq._torchfile": 3,
    "mpq.quant": 4,
    "mpq.graph": 5,
    "mpq.analyze": 6,
    "mpq.ptq": 6,
    "mpq.train": 6,
    "mpq.export": 7,
    "mpq.report": 8,
    "mpq.pipeline": 8,
    "mpq.cli": 9,
    "mpq.__main__": 9,
}
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


@pytest.mark.parametrize("module", [m for m in MODULES if m != "mpq"])
def test_every_module_has_a_layer(module: str):
    assert area(module) in LAYERS


@pytest.mark.parametrize("module", [m for m in MODULES if m != "mpq"])
def test_imports_point_down(module: str):
    here = LAYERS[area(module)]
    for name in own_imports(module):
        if name == "mpq":
            continue  # the version; the root package imports nothing by itself
        other = LAYERS[area(name)]
        assert other <= here, f"{module} (layer {here}) imports {name} (layer {other})"


@pytest.mark.parametrize("module", [m for m in MODULES if area(m) in SIBLINGS])
def test_siblings_do_not_know_each_other(module: str):
    others = {area(name) for name in own_imports(module)} & SIBLINGS - {area(module)}
    assert not others, f"{module} imports {others}"


@pytest.mark.parametrize("module", [m for m in MODULES if area(m) == "mpq.export"])
def test_export_knows_neither_analysis_nor_training(module: str):
    assert not {area(name) for name in own_imports(module)} & SIBLINGS


def test_one_module_imports_onnxruntime():
    found = {m for m in MODULES if any(n.split(".")[0] == "onnxruntime" for n in imports(m))}
    assert found == {"mpq.export.runtime"}


def test_policies_and_data_know_no_torch():
    light = ("mpq.errors", "mpq.spec", "mpq.policy", "mpq.target", "mpq.layers", "mpq.latency",
             "mpq.data", "mpq.report", "mpq.rundir")  # fmt: skip
    for module in MODULES:
        if area(module) in light:
            assert not any(n.split(".")[0] == "torch" for n in imports(module)), module


@pytest.mark.parametrize("start", sorted(MODULES))
def test_no_cycles(start: str):
    seen: set[str] = set()
    waiting = [n for n in own_imports(start) if n != start and start != "mpq"]
    while waiting:
        name = waiting.pop()
        assert name != start, f"{start} is imported by what it imports"
        if name in seen or name == "mpq":
            continue
        seen.add(name)
        waiting.extend(own_imports(name))


@pytest.mark.parametrize(
    "names",
    ["mpq.cli, mpq.export.bench", "mpq.policy, mpq.target, mpq.layers", "mpq.data, mpq.report"],
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
    for name in mpq.__all__:
        home = mpq._HOME[name]
        assert home in MODULES, f"{name}: {home} does not exist"
    with pytest.raises(AttributeError, match="module 'mpq' has no attribute 'nothing'"):
        mpq.nothing  # noqa: B018
