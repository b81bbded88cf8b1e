"""SSD equals the selective scan with A, step size and skip repeated over the channels of a head."""

import pytest
import torch

from pipeline.ops import reference, ssd
from pipeline.ops.ssd import ssd_scan
from tests.unit.ops.implementations import outputs_and_gradients, relative_errors


def ssd_inputs(batch, heads, width, steps, states, groups=None):
    """u, delta, A, B, C, D, z, delta_bias."""
    generator = torch.Generator().manual_seed(steps)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    narrow = (batch, states, steps) if groups is None else (batch, groups, states, steps)
    wide = (batch, heads * width, steps)
    inputs = [normal(*wide), normal(batch, heads, steps), -normal(heads).exp(), normal(*narrow), normal(*narrow)]
    return [*inputs, normal(heads), normal(*wide), normal(heads) - 2]


def as_selective_scan(u, delta, A, B, C, D, z, delta_bias, **options):
    width = u.shape[1] // delta.shape[1]
    spread = [t.repeat_interleave(width, dim=t.dim() // 2) for t in (delta, A, D, delta_bias)]
    rates = spread[1][:, None].expand(-1, B.shape[-2])
    return reference.selective_scan(u, spread[0], rates, B, C, spread[2], z, spread[3], **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("single_chunk", [256, 1], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 4, 3, 37, 5), None), ((2, 4, 3, 37, 5), 2), ((1, 1, 1, 1, 1), None), ((1, 2, 8, 130, 16), None)],
)
def test_equals_the_selective_scan_in_value_and_gradient(shape, groups, single_chunk, reverse, monkeypatch):
    monkeypatch.setattr(ssd, "SINGLE_CHUNK", single_chunk)
    monkeypatch.setattr(ssd, "CHUNK", 8)
    inputs = ssd_inputs(*shape, groups=groups)
    options = {"reverse": reverse, "return_ungated": True}
    got = outputs_and_gradients(ssd_scan, inputs, **options)
    want = outputs_and_gradients(as_selective_scan, [x.double() for x in inputs], **options)
    assert max(relative_errors(got, want)) < 1e-5


def test_bf16_stays_within_its_bound():
    inputs = ssd_inputs(2, 4, 16, 100, 16)
    low = [x.bfloat16() if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(inputs)]
    want = as_selective_scan(*[x.double() for x in low])
    got = ssd_scan(*low)
    assert got.dtype == torch.bfloat16
    assert max(relative_errors([got], [want])) < 3e-2


def test_steps_that_forget_everything_give_finite_gradients():
    inputs = ssd_inputs(1, 2, 3, 20, 4)
    inputs[2] = torch.full((2,), -1e4)
    assert all(t.isfinite().all() for t in outputs_and_gradients(ssd_scan, inputs))


def test_wrong_shapes_are_sentences():
    u, delta, A, B, C, *_ = ssd_inputs(2, 4, 3, 7, 5)
    with pytest.raises(ValueError, match=r"delta must have shape \(batch, heads, steps\) = \(2, H, 7\)"):
        ssd_scan(u, u[:, :5], A, B, C)
    with pytest.raises(ValueError, match=r"A must have one value per head, \(4,\), got \(12,\)"):
        ssd_scan(u, delta, torch.ones(12), B, C)
    with pytest.raises(ValueError, match="B and C must both have shape"):
        ssd_scan(u, delta, A, B, C[:, :2])
