"""The numerics of our Triton kernels in Triton's interpreter, which needs no GPU.

Triton decides for its interpreter when it is first imported, so the check runs in a separate process. The interpreter
is slow, so blocks and shapes are small.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed (286 MB; `pip install triton` runs these on any machine)", allow_module_level=True
    )

CHECK = """
import torch
from pipeline.ops import triton_library
from pipeline.ops.fused import Fused
from tests.unit.ops import test_mixer as mixers
from tests.unit.ops.implementations import ORACLE, outputs_and_gradients, relative_errors, scan_inputs

triton_library.BLOCK_CHANNELS, triton_library.CHUNK_STEPS = 4, 8
fused = Fused(triton_library.TritonLibrary())

def check(label, function, oracle, inputs, **options):
    got = outputs_and_gradients(function, inputs, **options)
    want = outputs_and_gradients(oracle, [None if x is None else x.double() for x in inputs], **options)
    worst = max(relative_errors(got, want), default=0.0)
    assert worst < 1e-5, (label, worst)
    return got

for shape, groups in (((2, 6, 19, 3), None), ((1, 8, 8, 2), 2), ((1, 1, 1, 1), None), ((0, 4, 5, 2), None)):
    for reverse in (False, True):
        inputs = scan_inputs(*shape, groups=groups, channels_last=reverse)
        first = check(shape, fused.scan, ORACLE.scan, inputs, reverse=reverse, return_ungated=True)
    again = outputs_and_gradients(fused.scan, inputs, reverse=True, return_ungated=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "not deterministic"

bare = scan_inputs(1, 4, 9, 2)
bare[5] = bare[6] = bare[7] = None
check("bare", fused.scan, ORACLE.scan, bare)

nan = scan_inputs(1, 4, 9, 2)
nan[0][0, 1, 5] = float("nan")
assert fused.scan(*nan).isnan().nonzero().tolist() == [[0, 1, t] for t in range(5, 9)]

mixers.BATCH, mixers.STEPS, mixers.CHANNELS, mixers.STATES, mixers.RANK = 1, 11, 6, 2, 2
whole = type(ORACLE)(name="triton", scan=fused.scan, conv=fused.conv, mixer=fused.mixer)
blend = torch.tensor([[0.3, 0.6]])
check("mixer", mixers.chain(whole, True, blend), mixers.chain(ORACLE, True, blend), mixers.flat_inputs(2))
"""


def test_kernels_equal_the_reference_in_value_and_gradient_and_are_deterministic():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    folder = Path(__file__).parents[3]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHECK], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
