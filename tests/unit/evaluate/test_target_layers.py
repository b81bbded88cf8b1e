"""Grad-CAM and receptive fields, on cases with known results and on plain and hierarchical networks."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.evaluate.gradcam import gradcam, overlay
from pipeline.evaluate.receptive_field import for_display, receptive_field, side_of_share
from pipeline.evaluate.target_layers import target_layers, watched
from pipeline.models import build_model

FAMILIES = [
    ("timm/resnet50", 96),
    ("timm/deit_small_patch16_224", 224),
    ("timm/swin_tiny_patch4_window7_224", 224),
    ("vim_nano", 32),
    ("efficientvim_m4", 128),
    ("vssd_tiny", 64),
]


class Stages(nn.Module):
    """A hierarchical classifier: stages, the mean over the map, one linear head."""

    def __init__(self, *stages: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.stages, self.head = nn.Sequential(*stages), head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images).mean((2, 3)))


def convolution(kernel: int, channels: int = 1, weight: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(3, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.constant_(layer.weight, weight)
    return layer


class TestReceptiveField:
    def test_one_convolution_sees_its_kernel_and_no_more(self) -> None:
        model = Stages(convolution(5), head=nn.Identity())
        field = receptive_field(model, [torch.rand(2, 3, 15, 15)])
        expected = np.zeros((15, 15))
        expected[5:10, 5:10] = 3.0  # three colours, weights of one, positive outputs
        assert field == pytest.approx(expected)
        assert side_of_share(field, 1.0) == 5

    def test_two_convolutions_see_the_convolution_of_their_kernels(self) -> None:
        second = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.ones_(second.weight)
        field = receptive_field(Stages(convolution(3), second, head=nn.Identity()), [torch.rand(1, 3, 11, 11)])
        row = np.convolve(np.ones(3), np.ones(3))
        assert field[3:8, 3:8] == pytest.approx(3 * np.outer(row, row))
        assert field.sum() == pytest.approx(3 * 81)

    def test_a_negative_output_has_no_field(self) -> None:
        assert (
            receptive_field(Stages(convolution(3, weight=-1.0), head=nn.Identity()), [torch.rand(1, 3, 9, 9)]).max()
            == 0
        )

    def test_the_mean_over_images_does_not_depend_on_the_batches(self) -> None:
        torch.manual_seed(0)
        model = Stages(convolution(3), nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), head=nn.Identity())
        images = torch.rand(4, 3, 9, 9)
        assert receptive_field(model, [images]) == pytest.approx(receptive_field(model, images.split(1)), rel=1e-5)

    def test_the_display_keeps_the_largest_at_one(self) -> None:
        shown = for_display(np.array([[0.0, 1e-3], [1.0, 32.0]]))
        assert shown.max() == 1.0
        assert shown[1, 0] == pytest.approx(0.5)

    def test_a_field_needs_an_image(self) -> None:
        with pytest.raises(ValueError, match="at least one image"):
            receptive_field(Stages(convolution(3), head=nn.Identity()), [])


class TestGradCAM:
    def test_the_evidence_is_the_planted_square(self) -> None:
        """Channel 0 responds to red alone and class 0 reads channel 0 alone, so its evidence is the red square."""
        layer = nn.Conv2d(3, 2, 1, bias=False)
        layer.weight.data = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None]
        images = torch.zeros(1, 3, 12, 12)
        images[:, 0, 2:5, 7:10] = 1.0
        images[:, 1, 8:11, 1:4] = 1.0
        model = Stages(layer, head=nn.Identity())
        for chosen, (rows, columns) in enumerate([(slice(2, 5), slice(7, 10)), (slice(8, 11), slice(1, 4))]):
            maps, classes = gradcam(model, images, torch.tensor([chosen]))
            inside = torch.zeros(12, 12)
            inside[rows, columns] = 1.0
            assert torch.equal(maps[0], inside)
            assert classes.tolist() == [chosen]

    def test_without_a_class_it_explains_the_predicted_one_and_leaves_out_evidence_against_it(self) -> None:
        layer = convolution(1, weight=1.0)
        head = nn.Linear(1, 2, bias=False)
        head.weight.data = torch.tensor([[-1.0], [1.0]])
        maps, classes = gradcam(Stages(layer, head=head), torch.rand(1, 3, 6, 6))
        assert classes.tolist() == [1]
        assert maps.max() == 1.0
        against, _ = gradcam(Stages(layer, head=head), torch.rand(1, 3, 6, 6), torch.tensor([0]))
        assert against.max() == 0.0

    @pytest.mark.parametrize("cls_token", ["middle", "none"])
    @pytest.mark.parametrize("order", ["raster", "cluster"])
    def test_the_tokens_of_a_vision_mamba_return_to_their_patches(self, cls_token: str, order: str) -> None:
        model = build_model(
            "vim_nano", num_classes=3, image_size=(32, 48), cls_token=cls_token, order=order,
            pool="cls" if cls_token == "middle" else "mean",
        ).eval()  # fmt: skip
        layers = target_layers(model)
        with torch.no_grad(), watched(model.patch_embed) as patches, watched(model.norm_f) as final:
            model(torch.rand(1, 3, 32, 48))
        tokens = patches[0]
        tokens = tokens if model.order is None else tokens[:, model.order]
        if model.cls_index is not None:
            tokens = torch.cat([tokens[:, : model.cls_index], torch.zeros(1, 1, 64), tokens[:, model.cls_index :]], 1)
        assert tokens.shape == final[0].shape
        assert torch.equal(layers.to_grid(tokens, (32, 48)).flatten(2).transpose(1, 2), patches[0])

    def test_the_overlay_is_a_picture(self) -> None:
        pixels = overlay(torch.randn(2, 3, 8, 8), torch.rand(2, 8, 8), (0.5,) * 3, (0.5,) * 3)
        assert pixels.shape == (2, 3, 8, 8)
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


@pytest.mark.parametrize(("size", "side"), [(32, 4), (64, 4), (128, 4), (224, 7)])
def test_the_map_of_a_resnet_is_never_a_single_pixel(size: int, side: int) -> None:
    """On 32 px the last map of a ResNet-18 is one pixel; Grad-CAM then uses the last map of three pixels a side or more."""
    model = build_model("timm/resnet18", image_size=size, num_classes=2).eval()
    with watched(target_layers(model).gradcam) as seen:
        model(torch.rand(1, 3, size, size))
    assert seen[0].shape[-2:] == (side, side)


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_every_family_has_a_map_with_gradients(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, image_size=size, num_classes=2)
    model.eval().requires_grad_(False)
    images = torch.rand(1, 3, size, size)
    maps, _ = gradcam(model, images)
    assert maps.shape == (1, size, size)
    assert torch.isfinite(maps).all()
    others = [gradcam(model, images, torch.tensor([c]))[0] for c in range(2)]
    assert max(float(m.max()) for m in others) == 1.0  # some class has evidence somewhere
    field = receptive_field(model, [images])
    assert field.shape == (size, size)
    assert np.isfinite(field).all()
    assert field.max() > 0


# Layouts of timm: convolutions under several names, tokens with and without a cls token, channels last, three axes.
TIMM = {
    "timm/mobilenetv3_small_050": (96, 128),
    "timm/densenet121": (96, 128),
    "timm/levit_128s": (224, 224),  # the only size it takes
    "timm/convnext_atto": (96, 128),
    "timm/swin_tiny_patch4_window7_224": (96, 128),
    "timm/vit_tiny_patch16_224": (96, 128),
    "timm/mixer_s32_224": (96, 64),
    "timm/xcit_nano_12_p16_224": (96, 128),
}


@pytest.mark.parametrize("name", TIMM)
def test_the_last_map_of_a_timm_model_is_the_one_that_timm_returns(name: str) -> None:
    """It equals the map of timm's own `forward_intermediates`, on images that are not square."""
    torch.manual_seed(0)
    model = build_model(name, image_size=TIMM[name], num_classes=2).eval()
    images = torch.rand(2, 3, *TIMM[name])
    layers = target_layers(model)
    with torch.no_grad(), watched(layers.receptive_field) as seen:
        model(images)
        ours = layers.to_grid(seen[-1], TIMM[name])
        plain = layers.receptive_field is not layers.gradcam
        (theirs,) = model.model.forward_intermediates(images, indices=1, intermediates_only=True, norm=plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    maps = torch.stack([gradcam(model, images, torch.full((2,), c))[0] for c in range(2)])
    assert maps.shape == (2, 2, *TIMM[name])
    assert set(maps.amax((2, 3)).flatten().tolist()) <= {0.0, 1.0}  # fresh weights may have no evidence for a class


def test_a_layout_that_timm_describes_otherwise_is_refused_by_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"MultiScaleVit keeps no map that is known here"):
        target_layers(build_model("timm/mvitv2_tiny", image_size=224, num_classes=2))
    crossed = build_model("timm/crossvit_tiny_240", image_size=240, num_classes=2)
    with pytest.raises(ConfigError, match="where a map of 192 channels was expected"):
        gradcam(crossed, torch.rand(1, 3, 240, 240))


def test_a_network_without_a_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="keeps no map"):
        target_layers(nn.Linear(3, 3))
