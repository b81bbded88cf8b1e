"""benchmarks.small drives real stages: its numbers belong together."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ENVIRONMENT, ROOT


def test_its_rates_times_and_mfu_are_of_the_same_step() -> None:
    command = [sys.executable, "-m", "benchmarks.small", "--rounds", "2", "--stages", "semi"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["step_ms_semi"] / 1e3
    assert found["images_per_second_semi"] * seconds == pytest.approx(16 * (1 + 4), rel=1e-3)
    # The bare loop computes the same images, and both MFUs are of the same FLOPs.
    rates = found["images_per_second_semi"] / found["bare_images_per_second_semi"]
    assert found["mfu_semi"] / found["bare_mfu_semi"] == pytest.approx(rates, rel=0.02)
    assert found["step_vs_bare_semi"] == pytest.approx(1 / rates, rel=1e-3)
    # 40 images forward and backward, and 32 forward, of 21.6 MFLOPs each in a process.
    flops = found["mfu_semi"] * found["peak_gflops"] * 1e9 * seconds
    assert flops == pytest.approx((3 * 40 + 32) * 21.6e6, rel=0.05)
    assert found["resnet18_mfu_semi"] > 0
