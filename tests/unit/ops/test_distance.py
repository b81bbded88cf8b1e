"""The distance of weights and teacher: the kernel and the torch form equal float64 for every length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops import distance
from pipeline.ops.distance import squared_distance_and_size


@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=30, deadline=None)
@given(count=st.sampled_from([1, 2, 15, 16, 17, 16383, 16384, 16385, 100_001, 2**18 + 3]), seed=st.integers(0, 99))
def test_both_forms_are_the_sums_of_float64(compiled: bool, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(count, generator=generator)
    a = b + 1e-3 * torch.randn(count, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(distance, "_library", lambda: None)
        got = squared_distance_and_size([a], [b])
    want = torch.stack([(a - b).double().square().sum(), b.double().square().sum()])
    torch.testing.assert_close(got, want, rtol=16 * 2**-24 if compiled else 1e-12, atol=0)


def test_float64_is_not_rounded() -> None:
    a = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    assert float(squared_distance_and_size([a], [torch.ones_like(a)])[0]) == pytest.approx(1e-24, rel=1e-3)


def test_a_nan_stays_a_nan() -> None:
    a = torch.zeros(40)
    a[7] = float("nan")
    assert squared_distance_and_size([a], [torch.zeros(40)])[0].isnan()
