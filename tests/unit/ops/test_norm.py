"""The compiled RMS norm and its gradients are those of torch in float64, for every width, and no bit depends on the threads."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops import norm
from pipeline.ops.native import build

pytestmark = pytest.mark.skipif(norm._library() is None, reason="there is no C++ compiler on this machine")
WIDTHS = st.sampled_from([1, 3, 4, 15, 16, 17, 63, 64, 100, 192, 384])


def _compiled_for(simd: str) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "best_simd", lambda: simd)
    norm._library.cache_clear()
    return patch


@pytest.mark.parametrize("simd", [*build.SIMD])
@settings(max_examples=40, deadline=None)
@given(
    leading=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    width=WIDTHS,
    size=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_and_its_gradients_are_those_of_float64(
    simd: str, leading: list[int], width: int, size: float, seed: int
) -> None:
    order = [*build.SIMD]
    if order.index(simd) < order.index(build.best_simd()):
        pytest.skip(f"this processor has no {simd}")
    generator = torch.Generator().manual_seed(seed)
    layer = norm.RMSNorm(width, eps=1e-5)
    torch.nn.init.normal_(layer.weight, generator=generator)
    x = (size * torch.randn(*leading, width, generator=generator)).requires_grad_()
    g = torch.randn(x.shape, generator=generator)
    patch = _compiled_for(simd)
    try:
        y = layer(x)
        found = (y, *torch.autograd.grad(y, (x, layer.weight), g))
    finally:
        patch.undo()
        norm._library.cache_clear()
    exact, weight = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    of_exact = F.rms_norm(exact, (width,), weight, 1e-5)
    wanted = (of_exact, *torch.autograd.grad(of_exact, (exact, weight), g.double()))
    # A gradient is a sum, in which terms may cancel, so it is as exact as they are.
    scale = exact.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    of_x = scale * g.double() * weight
    of_weight = (scale * g.double() * exact).abs().reshape(-1, width).sum(0)
    for a, b, term in zip(found, wanted, (of_exact, of_x, of_weight), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * float(term.detach().abs().max()))


def test_no_bit_depends_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    layer, x, g = norm.RMSNorm(100), torch.randn(999, 100, requires_grad=True), torch.randn(999, 100)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = layer(x)
        found.append((y, *torch.autograd.grad(y, (x, layer.weight), g)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_nan_stays_in_its_row() -> None:
    x = torch.ones(3, 20)
    x[1, 7] = torch.nan
    assert norm.RMSNorm(20)(x).isnan().all(1).tolist() == [False, True, False]


def test_torch_serves_every_other_case() -> None:
    layer, x = norm.RMSNorm(8), torch.randn(5, 8)
    assert torch.equal(layer.double()(x.double()), F.rms_norm(x.double(), (8,), layer.weight))
    assert layer.float()(x[:0]).shape == (0, 8)
    assert norm.RMSNorm(8, device="meta")(x.to("meta")).shape == (5, 8)
    for shape in ((4, 8), (8, 4)):
        several = norm.RMSNorm(shape)
        assert torch.equal(several(images := torch.randn(3, *shape)), F.rms_norm(images, shape))
    for width in (6, 16):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            layer(torch.randn(5, width))
    transposed = torch.randn(8, 5).t()
    assert torch.equal(layer(transposed), layer(transposed.contiguous()))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_tracer_sees_the_norm_of_torch() -> None:
    layer, x = norm.RMSNorm(8), torch.randn(5, 8)
    assert "rms_norm" in str(torch.jit.trace(layer, x).graph)
    assert "rms_norm" in str(torch.export.export(layer, (x,)).graph)


def test_a_weight_with_gaps() -> None:
    layer, x, weight = norm.RMSNorm(8), torch.randn(5, 8), torch.randn(16)[::2]
    layer.weight = torch.nn.Parameter(weight)
    wanted = F.rms_norm(x, (8,), weight, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(layer(x), wanted)
