"""The house's floors: imports go strictly downward, and what is optional is imported late, in one file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "launchers": 6,
    "stages": 5,
    "pipeline.evaluate.__main__": 5,
    "pipeline.predict": 5,
    "pipeline.train": 4,
    "pipeline.evaluate": 3,
    "pipeline.observe": 3,
    "pipeline.models": 2,
    "pipeline.data": 2,
    "pipeline.ops": 1,
    "pipeline": 0,
}
LATE = ("deepspeed", "mamba_ssm", "submitit", "fsspec", "timm", "sklearn", "matplotlib", "triton", "onnx")
ONE_FILE = ("deepspeed", "mamba_ssm", "submitit", "fsspec")
FILES = sorted(p for top in ("pipeline", "stages", "launchers") for p in (ROOT / top).rglob("*.py"))


def room(module: str) -> str:
    return max((r for r in FLOORS if module == r or module.startswith(r + ".")), key=len, default="")


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
    here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    wrong = [
        name for name, _ in imports(path) if (there := room(name)) and there != here and FLOORS[there] >= FLOORS[here]
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
