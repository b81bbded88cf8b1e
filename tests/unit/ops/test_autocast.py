"""Operators that promise fp32 keep it under a bf16 autocast, forward and backward: the closed form was 3.5e-3 wrong."""

import pytest
import torch

from pipeline.ops import choice
from pipeline.ops.reference import causal_conv1d_silu, selective_scan
from pipeline.ops.ssd import ssd_scan
from tests.unit.ops.implementations import NAMES, ORACLE, operators, outputs_and_gradients, scan_inputs
from tests.unit.ops.test_mixer import chain, flat_inputs

BF16 = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", [*NAMES, "reference"])
def test_scan_convolution_and_mixer_give_the_same_bits_with_and_without_autocast(name: str) -> None:
    implementation = ORACLE if name == "reference" else operators(name)
    images = [torch.randn(2, 8, 20), torch.randn(8, 1, 4), torch.randn(8)]
    calls = [
        (implementation.scan, scan_inputs(2, 12, 40, 5), {"return_ungated": True}),
        (implementation.conv, images, {}),
        (chain(implementation), flat_inputs(2), {}),
    ]
    for function, inputs, options in calls:
        want = outputs_and_gradients(function, inputs, **options)
        with BF16:
            got = outputs_and_gradients(function, inputs, **options)
        if (
            function is calls[2][0]
        ):  # autograd differentiates the projections of a composed chain, and autocast reaches it there
            got, want = got[:3], want[:3]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


def test_ssd_multiplies_in_the_dtype_of_its_input() -> None:
    u, delta, B, C = torch.randn(2, 12, 40), torch.randn(2, 3, 40), torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    inputs = (u, delta, -torch.rand(3), B, C, torch.rand(3))
    want = ssd_scan(*inputs)
    with BF16:
        assert torch.equal(ssd_scan(*inputs), want)


def test_a_kernel_that_is_right_only_without_autocast_fails_its_self_test() -> None:
    def rounded(u, delta, A, B, C, D, z, bias, **options):
        product = (torch.eye(u.shape[1]) @ u).to(u.dtype)  # autocast computes this product in bf16
        return selective_scan(product, delta, A, B, C, D, z, bias, **options)

    wrong = choice.Operators(name="wrong", scan=rounded, conv=causal_conv1d_silu)
    with pytest.raises(choice.Failing, match="relative error"):
        choice.self_test(wrong, torch.device("cpu"))
