"""The public operators: their definition by hand, and their checks of shapes."""

import math
import subprocess
import sys

import pytest
import torch

from pipeline.ops.scan import causal_conv1d_silu, selective_scan


def test_two_steps_by_hand():
    u = torch.tensor([[[2.0, 3.0]]], dtype=torch.float64)
    dt = torch.tensor([[[0.5, 0.25]]], dtype=torch.float64)
    A = torch.tensor([[-1.0]], dtype=torch.float64)
    B = torch.tensor([[[1.0, 4.0]]], dtype=torch.float64)
    C = torch.tensor([[[5.0, 6.0]]], dtype=torch.float64)
    D = torch.tensor([7.0], dtype=torch.float64)
    z = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    first = 0.5 * 2.0
    second = math.exp(-0.25) * first + 0.25 * 4.0 * 3.0
    out, ungated = selective_scan(u, dt, A, B, C, D, z, delta_softplus=False, return_ungated=True)
    assert ungated.flatten().tolist() == pytest.approx([5 * first, 6 * second])
    assert out.flatten().tolist() == pytest.approx([0.0, (6 * second + 21.0) / (1 + math.exp(-1))])


def test_two_taps_by_hand():
    x = torch.tensor([[[1.0, 2.0]]])
    weight = torch.tensor([[[10.0, 3.0]]])
    bias = torch.tensor([0.5])
    silu = torch.nn.functional.silu
    assert torch.allclose(causal_conv1d_silu(x, weight, bias), silu(torch.tensor([[[3.5, 16.5]]])))
    assert torch.allclose(causal_conv1d_silu(x, weight, bias, reverse=True), silu(torch.tensor([[[23.5, 6.5]]])))


def arguments(**replaced):
    ones = {
        "u": torch.ones(2, 6, 5),
        "delta": torch.ones(2, 6, 5),
        "A": -torch.ones(6, 4),
        "B": torch.ones(2, 4, 5),
        "C": torch.ones(2, 4, 5),
    }
    return {**ones, **replaced}


@pytest.mark.parametrize(
    ("replaced", "sentence"),
    [
        ({"u": torch.ones(2, 6)}, r"u must be .* \(batch, channels, steps >= 1\), got \(2, 6\)"),
        ({"u": torch.ones(2, 6, 0)}, "u must be"),
        ({"u": torch.ones(2, 6, 5, dtype=torch.int64)}, "floating point"),
        ({"delta": torch.ones(2, 6, 4)}, r"delta must have the shape of u, \(2, 6, 5\), got \(2, 6, 4\)"),
        ({"z": torch.ones(1, 6, 5)}, "z must have the shape of u"),
        ({"A": torch.ones(4, 6)}, r"A must have shape \(channels, states\) = \(6, N >= 1\), got \(4, 6\)"),
        ({"B": torch.ones(2, 5, 4)}, r"B must have shape \(2, 4, 5\), or .* got \(2, 5, 4\)"),
        ({"C": torch.ones(2, 4, 4, 5)}, "C must have shape .* G dividing the 6 channels"),
        ({"C": torch.ones(2, 3, 4, 5)}, "B and C must be grouped alike"),
        ({"D": torch.ones(4)}, r"D must have shape \(6,\), got \(4,\)"),
        ({"delta_bias": torch.ones(6, 1)}, "delta_bias must have shape"),
    ],
)
def test_wrong_shapes_are_sentences(replaced, sentence):
    with pytest.raises(ValueError, match=sentence):
        selective_scan(**arguments(**replaced))


def test_wrong_convolution_shapes_are_sentences():
    with pytest.raises(ValueError, match=r"weight must have shape \(channels, 1, taps\) = \(6, 1, K from 1 to 8\)"):
        causal_conv1d_silu(torch.ones(2, 6, 5), torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        causal_conv1d_silu(torch.ones(2, 6, 5), torch.ones(6, 1, 4), torch.ones(5))


def test_import_needs_torch_alone():
    forbidden = "mamba_ssm", "causal_conv1d", "torch.utils.cpp_extension"
    code = f"import sys, pipeline, pipeline.ops.scan; print([m for m in {forbidden} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
