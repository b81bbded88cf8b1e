"""Laws of the operators, for every implementation against the reference in fp64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.ops import closed_form, reference
from tests.unit.ops.implementations import NAMES, operators, outputs_and_gradients, relative_errors, scan_inputs

FP32_BOUND = 1e-5
BF16_BOUND = 2e-2  # outputs and gradients are rounded to 8 bits; sums over them add a little


def doubled(inputs):
    return [None if x is None else x.double() for x in inputs]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 1), None),
        ((1, 16, 1, 16), None),
        ((2, 20, 19, 5), 4),
        ((2, 20, 19, 5), None),
        ((1, 48, 70, 16), None),
        ((2, 130, 33, 17), None),
        ((3, 32, 40, 64), 2),
        ((0, 16, 9, 4), None),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scan_equals_the_reference_in_value_and_gradient(name, shape, groups, channels_last, reverse):
    inputs = scan_inputs(*shape, groups=groups, channels_last=channels_last)
    options = {"reverse": reverse, "return_ungated": True}
    got = outputs_and_gradients(operators(name).scan, inputs, **options)
    want = outputs_and_gradients(reference.selective_scan, doubled(inputs), **options)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert max(relative_errors(got, want), default=0.0) < FP32_BOUND


@pytest.mark.parametrize("absent", [{"D"}, {"z"}, {"delta_bias"}, {"D", "z", "delta_bias"}])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scan_without_its_optional_inputs(name, absent, softplus):
    names = ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"]
    inputs = [None if n in absent else x for n, x in zip(names, scan_inputs(2, 20, 37, 4), strict=True)]
    if not softplus:
        inputs[1] = inputs[1].abs() * 0.1
    got = outputs_and_gradients(operators(name).scan, inputs, delta_softplus=softplus)
    want = outputs_and_gradients(reference.selective_scan, doubled(inputs), delta_softplus=softplus)
    assert max(relative_errors(got, want)) < FP32_BOUND


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None, database=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    steps=st.integers(1, 70),
    states=st.integers(1, 64),
    reverse=st.booleans(),
)
@example(batch=1, channels=1, steps=9, states=9, reverse=True)
def test_scan_of_any_shape(name, batch, channels, steps, states, reverse):
    """The gradients of A, D and delta_bias are sums over images and steps, which may cancel.

    The error of delta_bias counts against the sum of magnitudes of its terms, delta's gradients. The terms of A and D are of the
    same size, so where a sum is less than a tenth of those magnitudes, its error counts against a tenth of them.
    """
    inputs = scan_inputs(batch, channels, steps, states)
    got = outputs_and_gradients(operators(name).scan, inputs, reverse=reverse)
    want = outputs_and_gradients(reference.selective_scan, doubled(inputs), reverse=reverse)
    o, u, delta, A, B, C, D, z, bias = ((a.double() - b).abs().max() for a, b in zip(got, want, strict=True))
    scale = [x.abs().max() for x in want]
    for error, size in zip((o, u, delta, B, C, z), (scale[k] for k in (0, 1, 2, 4, 5, 7)), strict=True):
        assert error < FP32_BOUND * size
    magnitude = want[2].abs().sum((0, 2)).max()
    for error, size in ((A, scale[3]), (D, scale[6])):
        assert error < FP32_BOUND * max(size, magnitude / 10)
    assert bias < FP32_BOUND * magnitude


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scan_in_bf16_stays_within_its_bound(name, channels_last):
    inputs = scan_inputs(2, 40, 50, 16, channels_last=channels_last)
    inputs = [x.bfloat16() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]  # A, D and the bias stay fp32
    got = outputs_and_gradients(operators(name).scan, inputs, return_ungated=True)
    want = outputs_and_gradients(reference.selective_scan, doubled(inputs), return_ungated=True)
    assert [g.dtype for g in got[2:]] == [x.dtype for x in inputs]
    assert got[0].dtype == torch.bfloat16
    assert max(relative_errors(got, want)) < BF16_BOUND


@pytest.mark.parametrize("name", NAMES)
def test_reverse_is_flip_scan_flip(name):
    inputs = scan_inputs(2, 20, 41, 8)
    flipped = [x.flip(-1) if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]
    got = operators(name).scan(*inputs, reverse=True, return_ungated=True)
    want = operators(name).scan(*flipped, return_ungated=True)
    assert max(relative_errors(list(got), [w.flip(-1) for w in want])) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_scan_reads_any_strides(name):
    contiguous = scan_inputs(2, 20, 23, 5)
    mixer = torch.randn(2, 23, 40)
    halves = [half.transpose(1, 2) for half in mixer.chunk(2, dim=2)]  # the output of in_proj: x and z of one tensor
    odd = [x.repeat_interleave(2, -1)[..., ::2] for x in contiguous]
    odd[3] = contiguous[3][:1].expand(2, -1, -1)  # one B for the whole batch: stride 0
    for strided in ([halves[0], *contiguous[1:6], halves[1], contiguous[7]], odd):
        got = operators(name).scan(*strided)
        want = reference.selective_scan(*doubled([x.contiguous() for x in strided]))
        assert max(relative_errors([got], [want])) < FP32_BOUND


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_a_sum_has_no_strides(name):
    inputs = [x.requires_grad_() for x in scan_inputs(2, 20, 23, 5)]
    got = torch.autograd.grad(operators(name).scan(*inputs).sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(reference.selective_scan(*exact).sum(), exact)
    assert max(relative_errors(list(got), list(want))) < FP32_BOUND


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 1, 6], ids=["u", "delta", "z"])
def test_nan_in_is_nan_out_and_nowhere_else(name, at):
    inputs = scan_inputs(2, 20, 41, 8)
    inputs[at][1, 3, 20] = float("nan")
    out = operators(name).scan(*inputs)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[1, 3, 20 : 21 if at == 6 else None] = True  # the gate touches one step, the state all later ones
    assert torch.equal(out.isnan(), hit)


@pytest.mark.parametrize("name", NAMES)
def test_large_steps_are_identity_of_softplus_and_forget_everything(name):
    inputs = scan_inputs(1, 4, 9, 2)
    inputs[1] = torch.full_like(inputs[1], 1e4)
    got = operators(name).scan(*inputs, return_ungated=True)
    want = reference.selective_scan(*doubled(inputs), return_ungated=True)
    assert max(relative_errors(list(got), list(want))) < FP32_BOUND


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_closed_form_passes_gradcheck_in_fp64(groups, reverse):
    inputs = [x.double().requires_grad_() for x in scan_inputs(2, 4, 19, 3, groups=groups)]

    def scan(*tensors):
        return closed_form.selective_scan(*tensors, reverse=reverse, return_ungated=True)

    assert torch.autograd.gradcheck(scan, inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "taps"), [((2, 20, 19), 4), ((1, 3, 1), 8), ((2, 200, 70), 2), ((1, 16, 33), 1), ((0, 4, 5), 3)]
)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_convolution_equals_the_reference(name, shape, taps, channels_last, reverse):
    batch, channels, steps = shape
    x = torch.randn(batch, steps, channels).transpose(1, 2) if channels_last else torch.randn(shape)
    for bias in (torch.randn(channels), None):
        inputs = [x, torch.randn(channels, 1, taps), bias]
        got = outputs_and_gradients(operators(name).conv, inputs, reverse=reverse)
        want = outputs_and_gradients(reference.causal_conv1d_silu, doubled(inputs), reverse=reverse)
        assert max(relative_errors(got, want), default=0.0) < FP32_BOUND
    low = operators(name).conv(x.bfloat16(), *inputs[1:], reverse=reverse)
    assert low.dtype == torch.bfloat16
    assert max(relative_errors([low], [want[0]]), default=0.0) < BF16_BOUND


@pytest.mark.parametrize("name", NAMES)
def test_convolution_keeps_nan_inside_its_window(name):
    x = torch.zeros(1, 20, 30)
    x[0, 2, 10] = float("nan")
    out = operators(name).conv(x, torch.ones(20, 1, 4), None)
    assert out.isnan().nonzero().tolist() == [[0, 2, t] for t in range(10, 14)]
