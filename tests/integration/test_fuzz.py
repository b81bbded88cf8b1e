"""A fixed sample of the fuzzers; `make fuzz` runs 10,000 cases."""

import json
import subprocess
import sys

from tests.conftest import ENVIRONMENT, ROOT


def test_a_sample_of_200_hostile_inputs_breaks_no_law() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "200", "--seed", "19"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["cases"], found["violations"]) == (200, 0)
