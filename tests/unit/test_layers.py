"""Imports go strictly from higher layers to lower ones, and optional packages are imported late, in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {
    "benchmarks": 9,
    "launchers": 10,
    "stages": 8,
    "pipeline.data": 7,
    "pipeline.evaluate.__main__": 7,
    "pipeline.models.__main__": 7,
    "pipeline.predict": 7,
    "pipeline.report.__main__": 7,
    "pipeline.report.experiment": 7,
    "pipeline.report.fields": 7,
    "pipeline.ssl": 6,
    "pipeline.train": 5,
    "pipeline.datasets.show": 4,
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
LATE = ("deepspeed", "mamba_ssm", "submitit", "fsspec", "timm", "sklearn", "matplotlib", "triton", "onnx")
ONE_FILE = ("deepspeed", "mamba_ssm", "submitit", "fsspec")
FILES = sorted(p for top in ("pipeline", "stages", "launchers") for p in (ROOT / top).rglob("*.py"))


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
    here = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
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
