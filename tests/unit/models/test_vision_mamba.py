"""Vision Mamba: published parameter counts, laws for every variant, and an oracle written from the equations."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.models.arm import ARM
from pipeline.models.config import DecoderConfig, VisionMambaConfig
from pipeline.models.layers import DropPath
from pipeline.models.variants import VISION_MAMBA_VARIANTS
from pipeline.models.vision_mamba.position_embedding import sincos_position_embedding
from pipeline.models.vision_mamba.tokens import cluster_order
from tests.unit.models import oracle

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
    assert [x.shape for x in model.forward_intermediates(images, intermediates_only=True)] == [(2, 16, 4, 6)] * 2
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    silent = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert silent == []


ENCODER_MILLIONS = {"arm_base": 79.9, "arm_large": 282.3, "arm_huge": 633.5}


@pytest.mark.parametrize(("name", "millions"), ENCODER_MILLIONS.items())
def test_parameter_counts_of_pretraining_encoders_are_the_published_ones(name: str, millions: float) -> None:
    config = VisionMambaConfig(name=name, image_size=192, order="cluster")
    with torch.device("meta"):
        backbone = ARM(config, DecoderConfig()).backbone
    # The position embedding of pretraining is fixed, and is not counted.
    assert round(sum(p.numel() for p in backbone.parameters() if p.requires_grad) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["arm_base", "arm_large", "arm_huge"])
def test_an_arm_name_is_the_fine_tuning_form(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    assert len(model.layers[0].mixer.suffixes) == 4
    assert (model.num_classes, model.image_size, model.pool, model.order) == (1000, (224, 224), "mean", None)


def test_a_model_of_the_meta_device_is_whole_once_it_is_given_weights() -> None:
    """Buffers that no state dict holds (orders of the scan, the mask) are real from the start."""
    for build in (
        lambda: build_model("vim_nano", directions=4, order="cluster"),
        lambda: ARM(VisionMambaConfig(name="vim_nano", order="cluster"), DecoderConfig(width=32, depth=2, num_heads=2)),
    ):
        model = build().eval()
        with torch.device("meta"):
            empty = build().eval()
        empty.load_state_dict(model.state_dict(), assign=True)
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(empty(images), model(images))


@pytest.mark.parametrize(
    ("stride", "image_size", "grid"),
    [(16, (224, 224), (14, 14)), (8, (224, 224), (27, 27)), (16, (64, 160), (4, 10)), (8, (40, 33), (4, 3))],
)
def test_grids_of_any_stride_and_shape(stride: int, image_size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = build_model("vim_tiny", image_size=image_size, stride=stride, embed_dim=16, depth=1, num_classes=2)
    assert model.grid_size == grid
    assert model.forward_features(torch.randn(1, 3, *image_size)).shape == (1, grid[0] * grid[1] + 1, 16)


def test_images_of_another_size_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"images are \(24, 16\), this model was built for \(16, 24\)"):
        build_model("vim_tiny", **SMALL)(torch.zeros(1, 3, 24, 16))


@pytest.mark.parametrize("order", ["raster", "cluster"])
def test_intermediates_follow_timms_interface(order: str) -> None:
    """Maps are row-major in any scan order, indices count as timm's do, and the last block's normed output is the features."""
    model = build_model("vim_tiny", **{**SMALL, "depth": 3}, order=order).eval()
    images = torch.randn(2, 3, 16, 24)
    final, every = model.forward_intermediates(images, norm=True)
    assert torch.equal(final, model.forward_features(images))
    tokens = every[-1].flatten(2).transpose(1, 2)
    in_raster = torch.cat([final[:, :12], final[:, 13:]], 1)
    assert torch.equal(tokens if order == "raster" else tokens[:, cluster_order((4, 6), 2)], in_raster)
    for indices, blocks in ((1, (2,)), (2, (1, 2)), ((0, -1), (0, 2)), ([1], (1,))):
        found = model.forward_intermediates(images, indices, norm=True, intermediates_only=True, stop_early=True)
        assert [torch.equal(f, every[b]) for f, b in zip(found, blocks, strict=True)] == [True] * len(blocks)
    (flat,) = model.forward_intermediates(images, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(flat, tokens)
    for wrong in ((3,), (-4,), 4):
        with pytest.raises(ValueError, match=r"name blocks outside 0\.\.2"):
            model.forward_intermediates(images, wrong)


def test_the_classifier_can_be_exchanged() -> None:
    model = build_model("arm_base", **SMALL).double()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(images))
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(3, global_pool="cls")
    assert torch.equal(model(images), model.head(model.forward_features(images)[:, 12]))
    assert model.num_features == model.head_hidden_size == 16


@pytest.mark.parametrize("name", ["vim_tiny", "arm_base"])
def test_activation_checkpointing_changes_memory_and_no_number(name: str) -> None:
    """Loss and gradients agree bit for bit, with drop path; fewer bytes are kept for the backward pass."""

    def train(enable: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = build_model(name, **SMALL, drop_path=0.5).train()
        model.set_grad_checkpointing(enable)
        own, kept = {p.data_ptr() for p in model.parameters()}, []

        def note(x: torch.Tensor) -> torch.Tensor:
            kept.append(0 if x.data_ptr() in own else x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model(torch.randn(4, 3, 16, 24)).square().sum()
        at_backward = sum(kept)
        loss.backward()
        return [loss, *(p.grad for p in model.parameters())], at_backward

    (plain, many), (again, few) = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few < many / 4


def test_drop_path_rises_to_its_rate_and_keeps_the_mean() -> None:
    model = build_model("vim_nano", drop_path=0.3)
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3])
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.ones(20_000, 1, 1)
    assert drop(x).mean().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(drop(x).unique(), torch.tensor([0, 1 / 0.7]))
    assert drop.eval()(x) is x


def test_an_unknown_name_or_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="known: vim_small"):
        build_model("vim_smal")
    with pytest.raises(ConfigError, match="did you mean 'embed_dim'"):
        build_model("vim_small", embed_dims=3)


@pytest.mark.parametrize("order", ["raster", "cluster"])
@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("name", ["vim_tiny", "arm_base"])
def test_the_forward_pass_equals_its_equations(name: str, directions: int, order: str) -> None:
    """Images are not square; both sides run in float64, so that the mathematics is compared and not the rounding."""
    torch.manual_seed(0)
    model = build_model(name, **SMALL, directions=directions, order=order).double().eval()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    expected = oracle.classify(model.state_dict(), images, pool=model.pool, side=2 if order == "cluster" else None)
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.float()(images.float()).double(), expected, rtol=1e-5, atol=1e-5)


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


def test_weight_decay_spares_vectors_the_cls_token_the_position_embedding_and_A() -> None:
    """In every direction; only the matrices of linear layers and convolutions decay."""
    model = build_model("arm_base", **SMALL)
    exempt = model.no_weight_decay()
    decays = {re.sub(r"layers\.\d\.", "", n) for n, p in model.named_parameters() if p.ndim > 1 and n not in exempt}
    projections = {
        f"mixer.{kind}{s}.weight" for kind in ("conv1d", "x_proj", "dt_proj") for s in ("", "_b", "_c", "_c_b")
    }
    shared = {"mixer.in_proj.weight", "mixer.out_proj.weight", "mlp.w1.weight", "mlp.w2.weight", "mlp.w3.weight"}
    assert decays == projections | shared | {"patch_embed.proj.weight", "head.weight"}
    assert {"pos_embed", "cls_token", "layers.1.mixer.A_log", "layers.1.mixer.A_c_b_log"} <= exempt


def test_cluster_order_by_hand() -> None:
    assert cluster_order((2, 4), 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_sincos_position_embedding_by_hand() -> None:
    p = sincos_position_embedding((2, 3), 8)[0]
    row, column, k = 1, 2, 1
    omega = 10000 ** (-k / 2)
    token = p[row * 3 + column]
    expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
    assert [token[i].item() for i in (1, 3, 5, 7)] == pytest.approx(expected, abs=1e-6)
