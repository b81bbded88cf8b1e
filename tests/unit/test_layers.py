"""Imports go strictly from higher layers to lower ones, optional packages are imported late, in one file; files are short."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "benchmarks": 9,
    "launchers": 10,
    "stages": 8,
    "pipeline.notebook": 9,
    "pipeline.timm_models": 3,
    "pipeline.data": 7,
    "pipeline.evaluate.__main__": 7,
    "pipeline.models.__main__": 7,
    "pipeline.predict": 7,
    "pipeline.rebalance": 7,
    "pipeline.report.__main__": 7,
    "pipeline.report.experiment": 7,
    "pipeline.report.worth": 6,
    "pipeline.classifier": 6,
    "pipeline.labelling": 6,
    "pipeline.report.fields": 7,
    "pipeline.ssl": 6,
    "pipeline.train": 5,
    "pipeline.evaluate": 4,
    "pipeline.report": 4,
    "pipeline.streaming": 3,
    "pipeline.exports": 3,
    "pipeline.datasets": 2,
    "pipeline.models": 2,
    "pipeline.ops": 1,
    "pipeline.storage": 1,
    "pipeline": 0,
}
MOST_LINES = 350
LATE = ("deepspeed", "mamba_ssm", "submitit", "obstore", "optuna", "timm", "sklearn", "matplotlib", "onnx")
ONE_FILE = ("deepspeed", "mamba_ssm", "submitit", "obstore", "optuna")
FILES = sorted(p for top in ("pipeline", "stages", "launchers") for p in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the dotted name of a file's module; that of a package for its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def layer_of(module: str) -> str:
    return max((r for r in LAYERS if module == r or module.startswith(r + ".")), key=len, default="")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at the top of the file)."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found += [(name, id(node) not in inside) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    here = layer_of(name_of(path))
    wrong = [
        name
        for name, _ in imports(path)
        if (there := layer_of(name)) and there != here and LAYERS[there] >= LAYERS[here]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", LATE)
def test_what_is_heavy_or_optional_is_imported_inside_functions(package: str) -> None:
    early = [p.name for p in FILES for name, top in imports(p) if name.split(".")[0] == package and top]
    assert early == []


@pytest.mark.parametrize("package", ONE_FILE)
def test_what_is_optional_is_imported_in_one_file(package: str) -> None:
    files = {p.name for p in FILES for name, _ in imports(p) if name.split(".")[0] == package}
    # DeepSpeed has two calls: joining the group (before CUDA is touched) and wrapping the model.
    assert files <= {"distributed.py", "engine.py"} if package == "deepspeed" else len(files) <= 1


def modules_imported(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere: at its top, inside functions, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import name`: the name may be a module of the package, or something that the package defines.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle in order, the first again at the end; empty if there is none."""
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module not in done:
            for target in sorted(graph[module]):
                if found := follow(target, [*way, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := follow(module, []))), [])


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circle({module: modules_imported(path) for module, path in MODULES.items()}) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("family", ["efficientvim", "timm_model", "vision_mamba", "vssd", "wide_resnet"])
def test_no_family_of_models_imports_another(family: str) -> None:
    """What two families share is in `pipeline/models/layers.py`."""

    def family_in(module: str) -> str:
        return (module.removeprefix("pipeline.models.") + ".").split(".")[0] if "pipeline.models." in module else ""

    own = [path for module, path in MODULES.items() if family_in(module) == family]
    imported = {family_in(module) for path in own for module in modules_imported(path)}
    assert own
    assert imported & {"efficientvim", "timm_model", "vision_mamba", "vssd", "wide_resnet", "arm"} <= {family}


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    """A longer file holds more than one thing: move one of them into a file of its own."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in tracked.splitlines()}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}
