"""On a GPU a step of every stage makes no call that waits for it; skipped without a GPU."""

import pytest
import torch

from tests.gpu import waits
from tests.steps import NAMES, steps_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_step_waits_for_nothing(name):
    steps = steps_of(name, torch.device("cuda"))
    steps.take(0)  # chooses kernels and compiles them
    with waits.forbidden():
        for step in range(1, 3):
            assert steps.take(step).moved
