"""On a GPU an EfficientViM, some of whose weights have nine numbers, trains in fp32; skipped without a GPU."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.unit.train.test_engine import ALIGNMENT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_every_zero_stage_trains_in_fp32() -> None:
    done = subprocess.run([sys.executable, "-c", ALIGNMENT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{zero} True 0 True" for zero in range(4)], done.stderr
