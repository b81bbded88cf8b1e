"""Laws of the products by oneDNN: those of `torch.nn.functional.linear` in float64, whatever the shapes and strides.

They are tested on every processor for which torch has oneDNN, also where the rule would take torch's own products.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import build_model
from pipeline.ops import linear as own

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN on this machine")
SIZES = st.integers(1, 40)
LAYOUTS = st.sampled_from(["rows", "columns", "rows with gaps", "columns with gaps", "every second number", "one row"])


@pytest.fixture(autouse=True, scope="module")
def _everything_by_onednn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(own, "onednn_is_faster", lambda: True)
        patched.setattr(own, "_SMALLEST", 1)
        patched.setattr(own, "_FEWEST_ROWS", 1)
        yield


def _laid_out(rows: int, columns: int, layout: str, generator: torch.Generator) -> Tensor:
    def drawn(height: int, width: int) -> Tensor:
        return torch.randn(height, width, generator=generator)

    return {
        "rows": lambda: drawn(rows, columns),
        "columns": lambda: drawn(columns, rows).t(),
        "rows with gaps": lambda: drawn(rows, columns + 3)[:, 1 : columns + 1],
        "columns with gaps": lambda: drawn(columns, rows + 3).t()[1 : rows + 1],
        "every second number": lambda: drawn(rows, 2 * columns)[:, ::2],
        "one row": lambda: drawn(1, columns).expand(rows, columns),
    }[layout]()


def _close(found: Tensor, wanted: Tensor) -> bool:
    largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * (largest + 1))


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS, st.booleans(), st.integers(0, 2**32 - 1))
def test_a_product_and_its_gradients_are_those_of_float64(
    rows: int, inner: int, out: int, of_x: str, of_weight: str, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = _laid_out(rows, inner, of_x, generator).requires_grad_()
    weight = _laid_out(out, inner, of_weight, generator).requires_grad_()
    bias = torch.randn(2 * out, generator=generator)[::2].requires_grad_() if biased else None
    given = [t for t in (x, weight, bias) if t is not None]
    double = [t.detach().double().requires_grad_() for t in given]
    y, wanted = own.linear(x, weight, bias), F.linear(*double)
    assert y.dtype == torch.float32
    assert _close(y, wanted)
    g = torch.randn(rows, out, generator=generator)
    for found, exact in zip(
        torch.autograd.grad(y, given, g), torch.autograd.grad(wanted, double, g.double()), strict=True
    ):
        assert found.shape == exact.shape
        assert _close(found, exact)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), SIZES, SIZES, st.integers(0, 2**32 - 1))
def test_any_leading_shape_also_an_empty_one(leading: list[int], inner: int, out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(*leading, inner, generator=generator), torch.randn(out, inner, generator=generator)
    weight.requires_grad_()
    y = own.linear(x, weight)
    assert y.shape == (*leading, out)
    assert _close(y, F.linear(x.double(), weight.double()))
    y.sum().backward()
    assert weight.grad is not None
    assert _close(weight.grad, x.double().reshape(-1, inner).sum(0).expand(out, inner))


def test_it_can_be_differentiated_twice() -> None:
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in [(6, 5), (4, 5)])
    found, wanted = (
        torch.autograd.grad(torch.autograd.grad(f(x, weight).square().sum(), x, create_graph=True)[0].sum(), weight)[0]
        for f in (own.linear, F.linear)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_what_torch_broadcasts_or_refuses_is_left_to_torch() -> None:
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    for bias in (torch.randn(1), torch.randn(1).expand(4), torch.randn(6, 4)):
        torch.testing.assert_close(own.linear(x, weight, bias), F.linear(x, weight, bias))
    assert own.linear(x, weight[0]).shape == (6,)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        own.linear(x, torch.randn(4, 7))


def test_a_result_may_be_changed_in_place() -> None:
    x, weight = torch.randn(3, 6, 5), torch.randn(4, 5, requires_grad=True)
    for rows in (x, x[0]):
        found, wanted = (torch.autograd.grad(f(rows, weight).relu_().sum(), weight)[0] for f in (own.linear, F.linear))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, False), (False, True), (True, True)])
def test_only_what_a_gradient_needs_is_kept(of_x: bool, of_weight: bool) -> None:
    x, weight = torch.randn(6, 5, requires_grad=of_x), torch.randn(4, 5, requires_grad=of_weight)
    kept: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = own.linear(x, weight)
    assert sorted(kept) == sorted([(4, 5)] * of_x + [(6, 5)] * of_weight)
    y.sum().backward()
    for t, wanted in ((x, of_x), (weight, of_weight)):
        assert (t.grad is not None) == wanted


def test_products_are_counted_as_torch_counts_its_own() -> None:
    x, weight = torch.randn(3, 6, 5), torch.randn(4, 5, requires_grad=True)
    counts = []
    for product in (own.linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            product(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 18 * 5 * 4


def test_under_autocast_and_in_another_precision_the_product_is_torchs() -> None:
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert own.linear(x, weight).dtype == torch.bfloat16
    assert torch.equal(own.linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert own.linear(x.to("meta"), weight.to("meta")).shape == (6, 4)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_tracer_sees_the_product_of_torch() -> None:
    layer, x = own.Linear(5, 4), torch.randn(6, 5)
    assert "linear" in str(torch.jit.trace(layer, x).graph)
    assert "aten.linear" in str(torch.export.export(layer, (x,)).graph)


def test_a_model_has_the_same_outputs_gradients_and_names_by_either_library(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = build_model("vim_nano", num_classes=5, image_size=(28, 28))
    images = torch.randn(4, 3, 28, 28)
    found = []
    for faster in (True, False):
        monkeypatch.setattr(own, "onednn_is_faster", lambda faster=faster: faster)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        found.append([logits.detach(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]])
    assert not all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "oneDNN was not used"
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
