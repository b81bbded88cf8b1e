"""The library imports without the optional packages, and its torch-free modules import without torch."""

import subprocess
import sys

from tests.conftest import ROOT

BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_module_imports_without_deepspeed_mamba_and_submitit() -> None:
    code = (
        BLOCKED.format(blocked={"deepspeed", "mamba_ssm", "submitit", "obstore"})
        + """
import importlib, pkgutil, pipeline
for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("all")
"""
    )
    done = python(code)
    assert done.stdout == "all\n", done.stderr


def test_configs_checks_and_launchers_need_no_torch() -> None:
    code = (
        BLOCKED.format(blocked={"torch", "deepspeed"})
        + "import stages.check, stages.configs, launchers.__main__, stages.__main__\nprint('light')"
    )
    done = python(code)
    assert done.stdout == "light\n", done.stderr
