"""The loop adds nothing to a step: between two log lines only the engine's own step reads a value from a tensor."""

import json
import sys

import pytest

from stages import SPECS
from tests import warm
from tests.conftest import Stages
from tests.integration.test_resume import parents


@pytest.mark.parametrize("stage", SPECS)
def test_no_hidden_synchronisation(chain: Stages, stage: str) -> None:
    overrides = chain.overrides("run.experiment=reads", *parents(chain, stage))
    done = warm.run([sys.executable, "-m", "tests.integration.reads", stage, f"configs/{stage}/smoke.yaml", *overrides])
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop("steps") == 4, done.stderr
    # DeepSpeed's norm and AdamW's own counters; LyapEMA reads its decay on a CPU only, where nothing waits.
    assert set(counts) <= {"engine.py:step", "lyapema.py:_move"}, counts
