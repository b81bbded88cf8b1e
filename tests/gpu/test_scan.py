"""The GPU implementations of the operators equal the reference; skipped without a GPU."""

import pytest
import torch

from pipeline.ops import reference
from pipeline.ops.choice import SCANS, Missing
from tests.unit.ops.implementations import outputs_and_gradients, relative_errors, scan_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = {"cuda": 1e-3, "triton": 1e-5}  # mamba-ssm is compiled with fast math


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 384, 197, 16), (1, 20, 19, 5), (2, 48, 1, 16)])
@pytest.mark.parametrize("name", BOUNDS)
def test_scan_equals_the_reference_in_value_and_gradient(name, shape, reverse):
    try:
        operators = SCANS[name](torch.device("cuda"))
    except Missing as reason:
        pytest.skip(str(reason))

    def scan_there(*inputs, **options):
        results = operators.scan(*[x.cuda() for x in inputs], **options)
        return tuple(r.cpu() for r in results)

    inputs = scan_inputs(*shape)
    options = {"reverse": reverse, "return_ungated": True}
    got = outputs_and_gradients(scan_there, inputs, **options)
    want = outputs_and_gradients(reference.selective_scan, [x.double() for x in inputs], **options)
    assert max(relative_errors(got, want)) < BOUNDS[name]


def test_our_triton_backward_gives_the_same_bits_twice():
    try:
        operators = SCANS["triton"](torch.device("cuda"))
    except Missing as reason:
        pytest.skip(str(reason))
    inputs = [x.cuda() for x in scan_inputs(4, 384, 197, 16)]
    first, second = (
        torch.autograd.grad(operators.scan(*leaves).sum(), leaves)
        for leaves in ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
