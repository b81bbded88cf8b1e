"""The wheel works without the checkout: installed in a fresh environment, it trains and predicts in an empty folder."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("pipeline", "stages", "launchers", "benchmarks")
STEPS = ["loop.steps=3", "loop.save_every=3", "semi:loop.eval_every=3", "data.test=data/digits/test"]


class Installed:
    """A fresh environment that holds the wheel, and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.environment, self.work = folder / "venv", folder / "work"
        self.work.mkdir()
        self.bin = self.environment / "bin"

    def run(self, *command: str) -> str:
        """Standard output of a command of the environment; fails with its errors if it fails."""
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        words = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(words, cwd=self.work, capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel and install it; third-party packages are those of this environment, added by a .pth file."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    made = Installed(folder)
    venv.create(made.environment, symlinks=True, with_pip=False)
    # A .pth file adds a folder to the path, but the .pth files of that folder (an editable checkout) are not read.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = made.environment / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    wheel = next(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", str(made.bin / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    return made


def test_everything_is_imported_from_the_wheel(installed: Installed) -> None:
    code = f"import {', '.join(PACKAGES)}\nfor m in ({', '.join(PACKAGES)}): print(m.__path__[0])"
    places = installed.run("python", "-c", code).splitlines()
    assert len(places) == len(PACKAGES)
    assert all(Path(place).is_relative_to(installed.environment) for place in places), places


def test_version_and_command_are_the_wheels_own(installed: Installed) -> None:
    code = "import importlib.metadata, pipeline\nprint(importlib.metadata.version('visionmamba-pipeline'), pipeline.__version__)"
    said, module = installed.run("python", "-c", code).split()
    assert said == module
    assert (installed.bin / "vmp").is_file()
    assert f"version: {module}\n" in (ROOT / "CITATION.cff").read_text()


def test_configs_come_with_the_wheel(installed: Installed) -> None:
    said = installed.run("vmp", "configs")
    for name in ("arm/smoke", "distill/demo", "semi/study", "cluster/cpu"):
        assert name in said


def test_a_chain_in_an_empty_folder_trains_and_predicts(installed: Installed) -> None:
    installed.run("vmp", "data", "convert", "digits", "--out", "data/digits")
    options = "--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 0"
    split = re.findall(r"data/digits/[\w.-]*split[\w.-]*", (ROOT / "configs/arm/smoke.yaml").read_text())[0]
    installed.run("vmp", "data", "split", "data/digits/train", "--out", split, *options.split())
    said = installed.run("vmp", "chain", "smoke", *STEPS)
    assert "report: runs/smoke/report.html" in said
    export = installed.work / "runs" / "smoke" / "semi" / "export"
    assert (export / "model.safetensors").is_file()
    assert (installed.work / "runs" / "smoke" / "report.html").stat().st_size > 10_000

    draw = "from PIL import Image; Image.new('RGB', (40, 30), (200, 30, 30)).save('image.png')"
    installed.run("python", "-c", draw)
    said = installed.run("vmp", "predict", str(export), "image.png", "--top", "3")
    assert said.startswith("image.png")


def test_every_third_party_import_is_a_declared_dependency() -> None:
    own = {*PACKAGES, "tests"}
    pins = [*PROJECT["dependencies"], *(pin for pins in PROJECT["optional-dependencies"].values() for pin in pins)]
    declared = {_normal(re.split(r"[=<>\[; ]", pin)[0]) for pin in pins}
    # Packages that come with a pinned one and are a face of it.
    within = {"pydantic_core": ["pydantic"], "markupsafe": ["Jinja2"], "mlflow": ["mlflow-skinny"]}
    distributions = {**packages_distributions(), **within}
    found = {name for top in PACKAGES for path in (ROOT / top).rglob("*.py") for name in _imports(path)}
    missing = {
        name
        for name in found - own - sys.stdlib_module_names
        if declared.isdisjoint(_normal(d) for d in distributions.get(name, [name]))
    }
    assert missing == set(), "add them to the dependencies in pyproject.toml"


def test_every_pin_is_exact() -> None:
    pins = [*PROJECT["dependencies"], *(pin for pins in PROJECT["optional-dependencies"].values() for pin in pins)]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.+]+", pin)] == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imports(path: Path) -> set[str]:
    """Top-level names that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found
