"""The GPU implementations of the operators equal the reference; skipped without a GPU."""

import pytest
import torch

from pipeline.ops import reference
from pipeline.ops.choice import SCANS, Missing, Operators
from tests.unit.ops import test_mixer as mixers
from tests.unit.ops.implementations import ORACLE, outputs_and_gradients, relative_errors, scan_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BOUNDS = {"cuda": 1e-5, "mamba_ssm": 1e-3}  # mamba-ssm is compiled with fast math


def operators(name: str) -> Operators:
    try:
        return SCANS[name](torch.device("cuda"))
    except Missing as reason:
        pytest.skip(str(reason))


def there(function):
    """Let a function of CPU tensors run on the GPU."""

    def call(*inputs, **options):
        results = function(*[None if x is None else x.cuda() for x in inputs], **options)
        return tuple(r.cpu() for r in results)

    return call


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 384, 197, 16), (1, 20, 19, 5), (2, 48, 1, 16), (1, 40, 700, 16), (1, 33, 50, 24)]
)
@pytest.mark.parametrize("name", BOUNDS)
def test_scan_equals_the_reference_in_value_and_gradient(name, shape, reverse):
    inputs = scan_inputs(*shape)
    options = {"reverse": reverse, "return_ungated": True}
    got = outputs_and_gradients(there(operators(name).scan), inputs, **options)
    want = outputs_and_gradients(reference.selective_scan, [x.double() for x in inputs], **options)
    assert max(relative_errors(got, want)) < BOUNDS[name]


@pytest.mark.parametrize("count", [1, 2])
def test_mixer_equals_the_reference_in_value_and_gradient(monkeypatch, count):
    for name, value in {"BATCH": 3, "STEPS": 197, "CHANNELS": 200, "STATES": 16, "RANK": 12}.items():
        monkeypatch.setattr(mixers, name, value)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    blend, inputs = torch.rand(3, count), mixers.flat_inputs(count)
    got = outputs_and_gradients(there(mixers.chain(operators("cuda"), True, blend.cuda())), inputs)
    want = outputs_and_gradients(mixers.chain(ORACLE, True, blend), [x.double() for x in inputs])
    assert max(relative_errors(got, want)) < 2e-5


def test_our_backward_gives_the_same_bits_twice():
    inputs = [x.cuda() for x in scan_inputs(4, 384, 197, 16)]
    scan = operators("cuda").scan
    first, second = (
        torch.autograd.grad(scan(*leaves).sum(), leaves)
        for leaves in ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
