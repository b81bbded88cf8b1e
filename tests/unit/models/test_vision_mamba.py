"""Vision Mamba: the counts that are published, laws for every variant, and an oracle written from the equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.models.config import VISION_MAMBA_VARIANTS
from pipeline.models.vision_mamba import cluster_order, sincos_positions

MILLIONS = {
    "vim_tiny": 7.15,
    "vim_small": 25.8,
    "vim_base": 97.6,
    "arm_base": 85.03,
    "arm_large": 297.0,
    "arm_huge": 662.7,
    "semivim_base": 145.6,
}
SMALL = {"image_size": (16, 24), "patch_size": 4, "cluster_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(name).parameters())
    assert float(f"{count / 1e6:.{len(str(millions).split('.')[1])}f}") == millions


@pytest.mark.parametrize("order", ["raster", "cluster"])
@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("name", VISION_MAMBA_VARIANTS)
def test_shapes_and_gradients_of_every_variant(name: str, directions: int, order: str) -> None:
    model = build_model(name, **SMALL, directions=directions, order=order, drop_path=0.1)
    images = torch.randn(2, 3, 16, 24)
    assert model.forward_features(images).shape == (2, 4 * 6 + 1, 16)
    assert [x.shape for x in model.forward_intermediates(images, (1, 2))] == [(2, 25, 16)] * 2
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    silent = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert silent == []


def test_an_unknown_name_or_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="known: vim_small"):
        build_model("vim_smal")
    with pytest.raises(ConfigError, match="did you mean 'embed_dim'"):
        build_model("vim_small", embed_dims=3)


def scan_by_hand(x, dt, a, b, c, d):
    """One image, tokens in order: x, dt (L, E), a (E, N), b, c (L, N), d (E)."""
    h, out = torch.zeros_like(a), []
    for t in range(len(x)):
        h = torch.exp(dt[t][:, None] * a) * h + dt[t][:, None] * b[t] * x[t][:, None]
        out.append((h * c[t]).sum(1) + d * x[t])
    return torch.stack(out)


def mixer_by_hand(mixer, x, orders):
    """x (L, D): every direction as the definition has it, on the tokens taken in that order, mapped back, averaged."""
    total = 0
    for s, order in zip(mixer.suffixes, orders, strict=True):
        u, z = (x[order] @ mixer.in_proj.weight.T).split(mixer.inner, -1)
        conv = getattr(mixer, f"conv1d{s}")
        padded = F.pad(u.T, (conv.kernel_size[0] - 1, 0))
        u = torch.stack(
            [(padded[:, t : t + conv.kernel_size[0]] * conv.weight[:, 0]).sum(1) + conv.bias for t in range(len(x))]
        )
        u = u * torch.sigmoid(u)
        low, b, c = getattr(mixer, f"x_proj{s}")(u).split([mixer.rank, mixer.d_state, mixer.d_state], -1)
        dt = torch.log1p(torch.exp(getattr(mixer, f"dt_proj{s}")(low)))
        y = scan_by_hand(u, dt, -torch.exp(getattr(mixer, f"A{s}_log")), b, c, getattr(mixer, f"D{s}"))
        y = y * z * torch.sigmoid(z)
        back = torch.empty_like(y)
        back[order] = y
        total = total + back
    return (total / len(orders)) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_the_mixer_equals_its_definition(directions: int) -> None:
    torch.manual_seed(0)
    model = build_model("vim_nano", image_size=(8, 12), directions=directions, num_classes=3)
    rows, across = 2, 3
    middle = rows * across // 2
    raster = list(range(rows * across))
    columns = [r * across + c for c in range(across) for r in range(rows)]

    def with_cls(order):
        order = [i + (i >= middle) for i in order]
        return [*order[:middle], middle, *order[middle:]]

    forward, down = with_cls(raster), with_cls(columns)
    orders = [forward, forward[::-1], down, down[::-1]][:directions]
    x = torch.randn(1, rows * across + 1, 64)
    expected = mixer_by_hand(model.layers[0].mixer, x[0], orders)
    torch.testing.assert_close(model.layers[0].mixer(x, model.columns)[0], expected, rtol=1e-4, atol=1e-5)


def test_one_direction_never_looks_ahead() -> None:
    model = build_model("vim_nano", directions=1, cls_token="none", pool="mean").eval()
    x = torch.randn(1, 64, 64)
    before = model.encode(x)[0]
    x[:, 40:] += 1
    assert torch.equal(model.encode(x)[0][:, :40], before[:, :40])


def test_four_equal_directions_see_a_constant_image_alike() -> None:
    model = build_model("vim_nano", directions=4, cls_token="none", pool="mean", pos_embed="learned").eval()
    mixer = model.layers[0].mixer
    state = mixer.state_dict()
    for key in state:
        for s in ("_c_b", "_b", "_c"):
            if s in key and "weight" not in key.split(s)[0]:
                origin = key.replace(s, "", 1)
                if origin in state and state[origin].shape == state[key].shape:
                    state[key] = state[origin].clone()
                    break
    mixer.load_state_dict(state)
    y = mixer(torch.ones(1, 64, 64), model.columns)[0]
    grid = y.view(8, 8, -1)
    torch.testing.assert_close(grid, grid.transpose(0, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, y.flip(0), rtol=1e-5, atol=1e-6)


def test_every_direction_starts_with_steps_between_a_thousandth_and_a_tenth() -> None:
    model = build_model("vim_nano", directions=4)
    for layer in model.layers:
        for s in layer.mixer.suffixes:
            steps = F.softplus(getattr(layer.mixer, f"dt_proj{s}").bias)
            assert steps.min() >= 1e-4 - 1e-7
            assert steps.max() <= 0.1 + 1e-6


def test_decay_spares_vectors_tokens_positions_and_A() -> None:
    model = build_model("vim_nano")
    exempt = model.no_weight_decay()
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_log", "layers.0.mixer.A_b_log"} <= exempt
    assert "layers.0.mixer.in_proj.weight" not in exempt


def test_cluster_order_by_hand() -> None:
    assert cluster_order((2, 4), 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_sincos_positions_by_hand() -> None:
    p = sincos_positions((2, 3), 8)[0]
    row, column, k = 1, 2, 1
    omega = 10000 ** (-k / 2)
    token = p[row * 3 + column]
    expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
    assert [token[i].item() for i in (1, 3, 5, 7)] == pytest.approx(expected, abs=1e-6)
