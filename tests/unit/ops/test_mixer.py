"""`mixer_scan` equals the chain of its two operators, for every implementation."""

import pytest
import torch

from pipeline.ops.scan import Direction, mixer_scan
from tests.unit.ops.implementations import NAMES, ORACLE, operators, outputs_and_gradients, relative_errors

BATCH, STEPS, CHANNELS, STATES, RANK = 2, 37, 40, 5, 3


def flat_inputs(count, batch=None, steps=None):
    """xz, then the fields of each direction."""
    generator = torch.Generator().manual_seed(count)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    inputs = [normal(BATCH if batch is None else batch, steps or STEPS, 2 * CHANNELS)]
    for _ in range(count):
        inputs += [normal(CHANNELS, 1, 4) * 0.5, normal(CHANNELS) * 0.1, normal(RANK + 2 * STATES, CHANNELS) * 0.2]
        inputs += [
            normal(CHANNELS, RANK) * 0.2,
            normal(CHANNELS) - 2,
            -normal(CHANNELS, STATES).exp(),
            normal(CHANNELS),
        ]
    return inputs


def chain(operators_, ungated=True, blend=None):
    return lambda xz, *fields: operators_.whole_mixer(
        xz, [Direction(*fields[k : k + 7]) for k in range(0, len(fields), 7)], blend=blend, return_ungated=ungated
    )


@pytest.mark.parametrize("ungated", [False, True])
@pytest.mark.parametrize("blended", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_mixer_equals_the_reference_in_value_and_gradient(name, count, blended, ungated):
    inputs = flat_inputs(count)
    blend = torch.rand(BATCH, count) if blended else None
    got = outputs_and_gradients(chain(operators(name), ungated, blend), inputs)
    want = outputs_and_gradients(chain(ORACLE, ungated, blend), [x.double() for x in inputs])
    assert len(got) == len(want)
    assert max(relative_errors(got, want)) < 1e-5


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 1), (1, 5), (0, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_mixer_of_one_step_or_one_image(name, batch, steps):
    inputs = flat_inputs(2, batch, steps)
    got = outputs_and_gradients(chain(operators(name)), inputs)
    want = outputs_and_gradients(chain(ORACLE), [x.double() for x in inputs])
    assert max(relative_errors(got, want), default=0.0) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_mixer_under_autocast_takes_bf16_and_gives_parameters_their_own_dtype(name):
    inputs = flat_inputs(2)
    want = outputs_and_gradients(chain(ORACLE), [x.double() for x in inputs])
    inputs[0] = inputs[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(chain(operators(name)), inputs)
    assert got[0].dtype == torch.bfloat16
    assert [g.dtype for g in got[3:]] == [x.dtype for x in inputs]
    assert max(relative_errors(got, want)) < 5e-2  # x_proj and dt_proj multiply in bf16


def test_the_ungated_outputs_make_the_gated_one():
    xz, *fields = flat_inputs(2)
    without_skip = [f if i % 7 != 6 else None for i, f in enumerate(fields)]
    directions = [Direction(*without_skip[:7]), Direction(*without_skip[7:])]
    o, p_forward, p_backward = mixer_scan(xz, directions, return_ungated=True)
    gate = torch.nn.functional.silu(xz[..., CHANNELS:])
    assert torch.allclose(o, gate * (p_forward + p_backward), atol=1e-5)


def test_one_rate_per_head_equals_the_rates_repeated_over_its_channels():
    xz, *fields = flat_inputs(2)
    heads = 5
    for k in (0, 7):
        fields[k + 3 : k + 7] = (
            fields[k + 3][:heads],
            fields[k + 4][:heads],
            fields[k + 5][:heads, 0],
            fields[k + 6][:heads],
        )
    directions = [Direction(*fields[k : k + 7]) for k in (0, 7)]
    spread = [
        Direction(
            d.conv_weight,
            d.conv_bias,
            d.x_proj,
            *(t.repeat_interleave(CHANNELS // heads, dim=0) for t in (d.dt_proj, d.dt_bias)),
            d.A.repeat_interleave(CHANNELS // heads)[:, None].expand(-1, STATES),
            d.D.repeat_interleave(CHANNELS // heads),
        )
        for d in directions
    ]
    assert max(relative_errors([mixer_scan(xz, directions)], [mixer_scan(xz, spread)])) < 1e-5


def test_wrong_shapes_are_sentences():
    xz, *fields = flat_inputs(1)
    with pytest.raises(ValueError, match=r"xz must be floating point of shape \(batch, steps >= 1, 2 x channels\)"):
        mixer_scan(xz[..., 1:], [Direction(*fields)])
    with pytest.raises(ValueError, match=r"one or two directions .* got 0"):
        mixer_scan(xz, [])
    with pytest.raises(ValueError, match=r"x_proj must have shape \(R \+ 2 N, channels\) = \(13, 40\), got \(12, 40\)"):
        mixer_scan(xz, [Direction(*fields)._replace(x_proj=fields[2][1:])])
    with pytest.raises(ValueError, match=r"blend must have shape \(batch, directions\) = \(2, 1\), got \(2,\)"):
        mixer_scan(xz, [Direction(*fields)], blend=torch.ones(2))
