"""Write requirements.txt from the pins of pyproject.toml, or check that it holds them.

Commands: `python .ci/requirements.py` writes the file; `python .ci/requirements.py --check` fails if it is stale.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# What a run needs, for `pip install -r requirements.txt`. Generated from pyproject.toml by `make requirements`: edit that.
# Extras are in pyproject.toml: pip install -e '.[dev]' (also docs, gpu, onnx, coreml, parquet, aws, wandb, mlflow, trackio).
"""


def main(arguments: list[str]) -> int:
    """Write or check the file; 1 if it is stale."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = HEADER + "".join(f"{pin}\n" for pin in project["dependencies"])
    path = ROOT / "requirements.txt"
    if "--check" not in arguments:
        path.write_text(wanted)
        return 0
    if path.read_text() != wanted:
        print(
            "error: requirements.txt differs from the pins in pyproject.toml; type: make requirements", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
