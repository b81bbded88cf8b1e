"""The containers run docker/install.sh alone; here its steps run in a fresh environment, since there may be no container tool."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

from tests.conftest import ROOT


def test_what_the_containers_run_installs_a_command_that_works(tmp_path: Path) -> None:
    """The packages are those of this environment: a .pth file adds them, and pip takes nothing from an index."""
    (tmp_path / "bin").mkdir()
    # A python3 whose new environments see the packages here, in place of the download.
    python = tmp_path / "bin/python3"
    packages = sysconfig.get_path("purelib")
    python.write_text(
        f'#!/bin/sh\n"{os.sys.executable}" "$@" || exit\n'
        f'for site in "$3"/lib/python3.*/site-packages; do echo "{packages}" > "$site/packages.pth"; done\n'
    )
    python.chmod(0o755)
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"PATH": f"{python.parent}:{os.environ['PATH']}", "PIP_OPTIONS": "--no-index --no-build-isolation"}
    folder = tmp_path / "environment"
    done = subprocess.run(
        [str(ROOT / "docker/install.sh"), str(folder), "none"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"torch \S+ for CUDA", done.stdout)
    assert "arm/demo" in done.stdout
    assert (folder / "bin/vmp").is_file()


def test_both_recipes_are_the_same_steps() -> None:
    image, recipe = ((ROOT / "docker" / name).read_text() for name in ("Dockerfile", "pipeline.def"))
    for words in (
        "python:3.11-slim-bookworm",
        "ibverbs-providers libibverbs1 librdmacm1",
        "docker/install.sh /opt/pipeline",
    ):
        assert words in image
        assert words in recipe
    for name in re.findall(r"REQUIREMENTS=(\S+\.txt)", image + recipe):
        assert (ROOT / name).is_file(), name
    assert "git" not in re.sub(r"#.*", "", image + recipe).replace("digits", "")
