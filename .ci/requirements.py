"""Write requirements.txt and its variants for other builds of torch from the pins of pyproject.toml, or check them.

Commands: `python .ci/requirements.py` writes the files; `python .ci/requirements.py --check` fails if one is stale.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# What a run needs, for `pip install -r {name}`. Generated from pyproject.toml by `make requirements`: edit that.
# Extras are in pyproject.toml: pip install -e '.[dev]'
# (also docs, gpu, onnx, coreml, parquet, huggingface, aws, wandb, mlflow, trackio, sweep).
"""
INDEX = "https://download.pytorch.org/whl"
BUILDS = (
    "cpu",
    "cu126",
    "cu128",
)  # builds of torch and torchvision without GPUs, and for drivers too old for the default
OF_THE_BUILD = ("torch==", "torchvision==")


def contents() -> dict[str, str]:
    """Return name -> text of every file."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    files = {"requirements.txt": "".join(f"{pin}\n" for pin in pins)}
    for build in BUILDS:
        exact = [f"{pin}+{build}" if pin.startswith(OF_THE_BUILD) else pin for pin in pins]
        files[f"requirements-{build}.txt"] = f"--extra-index-url {INDEX}/{build}\n" + "".join(
            f"{pin}\n" for pin in exact
        )
    return {name: HEADER.format(name=name) + text for name, text in files.items()}


def main(arguments: list[str]) -> int:
    """Write or check the files; 1 if one is stale."""
    for name, wanted in contents().items():
        path = ROOT / name
        if "--check" not in arguments:
            path.write_text(wanted)
        elif not path.exists() or path.read_text() != wanted:
            print(f"error: {name} differs from the pins in pyproject.toml; type: make requirements", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
