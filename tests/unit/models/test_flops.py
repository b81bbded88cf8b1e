"""The cost of a model is counted without computing it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.efficiency import published
from pipeline.models import build_model
from pipeline.models.flops import forward_flops
from pipeline.ops.choice import choose_scan
from pipeline.ops.meta import scan_flops
from pipeline.ops.scan import selective_scan


def test_the_scan_is_counted_by_its_formula():
    u, A = torch.empty(2, 8, 5, device="meta"), torch.empty(8, 16, device="meta")
    B = torch.empty(2, 16, 5, device="meta")
    with FlopCounterMode(display=False) as counter:
        assert selective_scan(u, u, A, B, B).shape == u.shape
    assert counter.get_total_flops() == scan_flops(2, 8, 5, 16) == 2 * 8 * 5 * (9 * 16 + 4)


@pytest.mark.parametrize(("name", "gflops"), [("arm_base", 33.9)])
def test_published_figures(name: str, gflops: float):
    """ARM-B in fine-tuning at 224, 2 FLOPs a multiply-add, as derived from its published layers."""
    with torch.device("meta"):
        model = build_model(name)
    assert forward_flops(model, (224, 224)) / 1e9 == pytest.approx(gflops, rel=0.01)


def test_the_supplements_table_5_fits_one_forward_pass_for_base_alone():
    """59.2 is published and 59.4 counted; Small and ViT-Base are off by factors of 2.8 and 2.5. The remark says so."""
    table = published()
    ours = {row[0]: float(row[3]) for row in table.rows}
    assert ours == {"Semi-ViM-Small": 10.8, "Semi-ViM-Base": 59.4, "Semi-ViT-Base": 35.1}
    assert [row[4] for row in table.rows] == ["2.83", "1.00", "2.45"]
    assert "59.4 counted against 59.2" in table.markdown()


def test_the_count_is_that_of_a_real_pass_plus_the_scans():
    """What FlopCounterMode sees of a real forward pass is all but the scan and the compiled convolution."""
    model = build_model("vim_nano").eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    choose_scan("reference")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 32, 32))
    finally:
        choose_scan("auto")
    tokens, inner, states, directions, depth = 65, 128, 8, 2, 4
    scans = depth * directions * scan_flops(1, inner, tokens, states)
    assert forward_flops(model, (32, 32)) == counter.get_total_flops() + scans
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_twice_the_pixels_cost_twice_but_for_the_head():
    with torch.device("meta"):
        small, large = (build_model("vim_nano", image_size=size) for size in ((32, 32), (32, 64)))
    assert forward_flops(large, (32, 64)) / forward_flops(small, (32, 32)) == pytest.approx(2, rel=0.02)
