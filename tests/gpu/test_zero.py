"""On a GPU an EfficientViM, some of whose weights have nine numbers, trains in fp32, and Muon steps as on a CPU."""

import subprocess
import sys

import pytest
import torch

from pipeline.train.muon import orthogonalise
from tests.conftest import ROOT
from tests.unit.train.test_engine import ALIGNMENT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_every_zero_stage_trains_in_fp32() -> None:
    done = subprocess.run([sys.executable, "-c", ALIGNMENT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{zero} True 0 True" for zero in range(4)], done.stderr


def test_muons_products_of_bf16_have_the_directions_of_a_cpus() -> None:
    torch.manual_seed(0)
    for shape in ((48, 192), (192, 48), (32, 16, 3, 3)):
        given = torch.randn(shape)
        here, there = given.clone(), given.cuda()
        orthogonalise([here])
        orthogonalise([there])
        assert (there.cpu() - here).norm() < 0.05 * here.norm()
