"""WRN-28-2: its size, and its forward pass against literal equations in float64."""

import re

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.models.flops import forward_flops

Weights = dict[str, torch.Tensor]


def literal(weights: Weights, x: torch.Tensor, blocks: int) -> torch.Tensor:
    """The network as FixMatch's port states it, by name of the released file: no module, no loop over modules."""

    def norm(x: torch.Tensor, name: str, eps: float = 1e-5) -> torch.Tensor:
        mean, variance, scale, shift = (
            weights[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + eps).sqrt() * scale + shift

    def active(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.1 * x)

    x = F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"], padding=1)
    for stage in (1, 2, 3):
        for i in range(blocks):
            name = f"block{stage}.layer.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = active(norm(x, f"{name}.bn1"))
            branch = F.conv2d(y, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            branch = F.conv2d(active(norm(branch, f"{name}.bn2")), weights[f"{name}.conv2.weight"], padding=1)
            if i == 0:
                x = F.conv2d(y if stage == 1 else x, weights[f"{name}.convShortcut.weight"], stride=stride)
            x = x + branch
    pooled = active(norm(x, "bn1", 1e-3)).sum((2, 3)) / (x.shape[2] * x.shape[3])
    return pooled @ weights["fc.weight"].T + weights["fc.bias"]


def test_it_has_the_published_size() -> None:
    """1.47 M parameters for ten classes; 0.42 GFLOP (multiply-accumulates count two) of one 32 x 32 image."""
    with torch.device("meta"):
        model = build_model("wrn_28_2", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 1_467_626
    assert build_model("wrn_28_2", num_classes=100).num_features == 128


def test_a_released_state_dict_gives_the_literal_networks_logits() -> None:
    torch.manual_seed(0)
    model = build_model("wrn_28_2", num_classes=5, depth=16).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias)
    names = {"stem": "conv1", "norm": "bn1", "head": "fc"}
    inside = {"norm1": "bn1", "norm2": "bn2", "shortcut": "convShortcut"}
    released: Weights = {}
    for key, value in model.state_dict().items():
        block = re.fullmatch(r"stages\.(\d)\.(\d)\.(\w+)\.(\w+)", key)
        if block:
            stage, i, part, kind = block.groups()
            key = f"block{int(stage) + 1}.layer.{i}.{inside.get(part, part)}.{kind}"
        else:
            first, _, rest = key.partition(".")
            key = f"{names[first]}.{rest}"
        released[key] = value.clone()
    fresh = build_model("wrn_28_2", num_classes=5, depth=16).double().eval()
    missing = fresh.load_state_dict(fresh.convert(released))
    assert not missing.missing_keys
    images = torch.randn(3, 3, 32, 24, dtype=torch.float64)
    want = literal(released, images, blocks=2)
    torch.testing.assert_close(fresh(images), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(images), want, rtol=1e-10, atol=1e-12)


def test_running_statistics_keep_a_thousandth_of_a_batch() -> None:
    model, images = build_model("wrn_28_2", num_classes=2, depth=10), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        first = model.stem(images)
    model.train()(images)
    torch.testing.assert_close(model.stages[0][0].norm1.running_mean, 1e-3 * first.mean((0, 2, 3)))


def test_its_flops_are_those_of_its_convolutions() -> None:
    """Twice the multiply-accumulates, summed by hand over the layers of WRN-28-2."""
    sizes, widths = (32, 16, 8), (16, 32, 64, 128)
    macs = 32 * 32 * 3 * 16 * 9 + 128 * 10
    for stage, size in enumerate(sizes):
        a, b = widths[stage], widths[stage + 1]
        macs += size * size * (9 * a * b + a * b + 7 * 9 * b * b)
    found = forward_flops(build_model("wrn_28_2", num_classes=10), (32, 32))
    assert found == pytest.approx(2 * macs, rel=0.01)


def test_a_depth_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be 6 n \+ 4"):
        build_model("wrn_28_2", depth=20)
