"""Who may import whom, and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEVELS = [  # a module imports only from levels above it
    {"version", "errors", "columns", "selection", "grouping", "view"},
    {"pattern_base", "regroup", "text", "child", "strict_yaml", "example_inputs", "tables"},
    {"strips", "sources", "encoding"},
    {"vnm"},
    {"pattern", "store", "timing", "ort", "mapping"},
    {"intersection", "migrating"},
    {"selection_checks"},
    {"layout", "_fx", "cost", "operators", "modes", "sizes", "writes"},
    {"ops", "sites", "graph", "uses", "late", "semi_structured"},
    {"roles", "program", "normal_form", "invariants", "profiling", "resuming", "lowered"},
    {"tracing", "pipeline", "quality", "prediction", "signature", "imagined"},
    {"backend", "data", "axes", "oneshot"},
    {"registry", "training", "permuting"},
    {"recipe", "catalogue", "artifact", "attached", "peers", "machine", "onnxfile"},
    {"onnxrequest", "methods", "heads", "loaded", "plan"},
    {"pretrained", "taskdata"},
    {"models", "inspection", "description", "shorthand", "attaching", "benchmark"},
    {"onnxcompile", "refusals", "resolving", "teachers"},
    {"tasks"},
    {"api", "show", "plot", "opt", "explain"},
    {"show_bench", "choosing", "report"},
    {"search"},
    {"show_speed"},
    {"cli"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
SURFACE = {"__init__"}  # names everything, imports nothing until asked
# Imports inside a function against the order, each argued where it stands.
LATE = {("pipeline", "recipe"), ("pattern_base", "pattern"), ("pattern", "intersection")}
MAKES_BACKENDS = "sparsec.recipe.make_backend"  # how a backend that builds on another asks for it, by name
SOLE_IMPORTERS = {
    "transformers": {"pretrained", "training"},
    "typer": {"cli"},
    "rich": {"cli", "show", "show_speed", "show_bench"},
    "onnx": {"onnxfile", "peers"},
    "matplotlib": {"plot", "report"},
    "jinja2": {"report"},
}
HEAVY = ["torch", "numpy", "scipy", "onnx", "onnxruntime", "onnxscript", "transformers", "safetensors", "pydantic"]

CORE = sorted((ROOT / "sparsec").glob("*.py"))
# Each at its level.
PARTED = ("axes", "cli", "oneshot", "choosing", "onnxfile", "training", "permuting", "report", "migrating")
PACKAGES = {name: sorted((ROOT / "sparsec" / name).glob("*.py")) for name in PARTED}
PLUGINS = sorted([*(ROOT / "passes").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])


def typing_only(tree: ast.Module) -> set[ast.AST]:
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {child for block in blocks for statement in block.body for child in ast.walk(statement)}


def imports(path: Path, with_typing: bool = False) -> Iterator[tuple[str, bool]]:
    """Dotted modules that a file imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text())
    ignored = set() if with_typing else typing_only(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {child for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in inside
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node not in inside


def core_modules(path: Path, with_typing: bool = False) -> set[str]:
    """The modules of the core that a file imports, as `pattern` for sparsec.pattern."""
    return {name.split(".")[1] for name, _ in imports(path, with_typing) if name.startswith("sparsec.")}


def test_every_module_of_the_core_has_a_level() -> None:
    assert {path.stem for path in CORE} - SURFACE | PACKAGES.keys() == LEVEL.keys()
    assert sum(len(names) for names in LEVELS) == len(LEVEL)


@pytest.mark.parametrize("path", [path for path in CORE if path.stem not in SURFACE], ids=lambda path: path.stem)
def test_the_core_imports_only_from_levels_above(path: Path) -> None:
    wrong = {name for name in core_modules(path) if LEVEL[name] >= LEVEL[path.stem] and (path.stem, name) not in LATE}

    assert set() == wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_of_the_core_imports_itself_and_levels_above(package: str) -> None:
    for path in PACKAGES[package]:
        wrong = {name for name in core_modules(path) if name != package and LEVEL[name] >= LEVEL[package]}

        assert set() == wrong, path


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_names_no_pass_and_no_backend(path: Path) -> None:
    assert not core_modules(path, with_typing=True) & {"passes", "backends"}
    if path.stem != "registry":
        assert "sparsec.passes" not in path.read_text()
        assert "sparsec.backends" not in path.read_text()


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_pass_or_backend_imports_the_core_and_its_own_package_only(path: Path) -> None:
    own = list(path.relative_to(ROOT).parts[:2])  # passes/mask.py, backends/onnx
    for name in {name for name, _ in imports(path, with_typing=True) if name.startswith("sparsec")}:
        parts = name.split(".")
        if parts[1] in ("passes", "backends"):
            assert own == parts[1:3], name
        else:
            assert parts[1] not in ("api", "cli", "show", "models", "recipe") or name == MAKES_BACKENDS, name


@pytest.mark.parametrize("package", SOLE_IMPORTERS)
def test_a_third_party_stays_in_its_one_module(package: str) -> None:
    files = {path: path.stem for path in CORE} | {path: name for name, paths in PACKAGES.items() for path in paths}
    users = {module for path, module in files.items() for name, _ in imports(path) if name.split(".")[0] == package}

    assert users <= SOLE_IMPORTERS[package]


@pytest.mark.parametrize("path", [*CORE, *PACKAGES["cli"]], ids=lambda path: path.stem)
def test_the_core_imports_nothing_heavy_at_its_top(path: Path) -> None:
    allowed = {"torch"} if path.stem in ("ops", "late", "semi_structured") else set()
    allowed |= {"pydantic"} if path.stem == "recipe" else set()
    top = {name.split(".")[0] for name, at_import in imports(path) if at_import}

    assert set() == top & set(HEAVY) - allowed


def child(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


LOADED = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


@pytest.mark.parametrize(
    "code",
    [
        "import sparsec",
        "import sparsec; sparsec.__version__; dir(sparsec)",
        "from sparsec import SparsecError",
        "import sparsec.cli",
        "from sparsec import cli\ntry: cli.app(['--help'])\nexcept SystemExit: pass",
        "from sparsec import Pattern; Pattern.parse('64:2:5').words",
    ],
)
def test_a_light_start_loads_nothing_heavy(code: str) -> None:
    assert "[]" == child(f"{code}\n{LOADED}").splitlines()[-1]


def test_opening_an_artifact_needs_neither_transformers_nor_onnx() -> None:
    code = f"import sparsec; sparsec.load, sparsec.Artifact\n{LOADED}"
    loaded = ast.literal_eval(child(code).splitlines()[-1])

    assert not {"transformers", "onnx", "onnxruntime", "onnxscript", "scipy"} & set(loaded)


def test_help_is_instant() -> None:
    """Processor seconds of the child, the least of three: wall time would measure the neighbours."""
    code = (
        "import time\nfrom sparsec import cli\ntry: cli.app(['--help'])\nexcept SystemExit: print(time.process_time())"
    )

    start = time.perf_counter()
    best = min(float(child(code).splitlines()[-1]) for _ in range(3))
    assert best < 0.5, f"{best:.2f} s of processor time ({time.perf_counter() - start:.1f} s passed for three)"
