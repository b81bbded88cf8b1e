"""make takes any variable; ours refuses one that no target reads, by the real make."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "help", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_variable_that_no_target_reads_is_refused_with_those_that_exist() -> None:
    done = make("NAME=mine", "BUGET=1h")
    assert done.returncode == 2
    assert "no target reads BUGET. Variables are ARGS BUDGET" in done.stderr


def test_each_variable_that_the_help_names_is_read() -> None:
    named = set(re.findall(r"\b([A-Z_]+)=", make().stdout))
    assert {"NAME", "BUDGET", "ARGS", "SEEDS"} <= named
    done = make(*(f"{name}=1" for name in sorted(named)))
    assert (done.returncode, done.stderr) == (0, "")


def test_each_variable_of_the_list_is_read_somewhere() -> None:
    listed = re.search(r"^VARIABLES := ((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)
    assert listed
    rest = MAKEFILE.replace(listed[0], "")
    for name in listed[1].replace("\\\n", " ").split():
        assert f"$({name}" in rest or f"$(or $({name})" in rest
