"""ARM: what it may see, what it must predict, and the number that predicting nothing scores."""

import pytest
import torch

from pipeline.models.arm import ARM, block_causal_mask, pixel_loss
from pipeline.models.config import DecoderConfig, VisionMambaConfig, default_taps

GEOMETRIES = [((32, 32), 4, 8), ((16, 48), 4, 8), ((24, 24), 2, 12), ((64, 32), 8, 16)]


def build(image_size=(32, 32), patch_size=4, cluster_size=8) -> ARM:
    torch.manual_seed(0)
    model = VisionMambaConfig(
        name="vim_nano", image_size=image_size, patch_size=patch_size, cluster_size=cluster_size, embed_dim=32, depth=3
    )
    return ARM(model, DecoderConfig(width=32, depth=2, num_heads=2)).eval()


def cluster_of_pixels(arm: ARM, images: torch.Tensor, cluster_size: int) -> torch.Tensor:
    """(H, W): which cluster each pixel belongs to, row by row."""
    height, width = images.shape[-2:]
    rows = torch.arange(height) // cluster_size
    columns = torch.arange(width) // cluster_size
    return rows[:, None] * (width // cluster_size) + columns[None, :]


@pytest.mark.parametrize(("image_size", "patch_size", "cluster_size"), GEOMETRIES)
def test_changing_cluster_k_leaves_predictions_of_clusters_1_to_k_bit_identical(
    image_size, patch_size, cluster_size
) -> None:
    arm = build(image_size, patch_size, cluster_size)
    images = torch.randn(2, 3, *image_size)
    which = cluster_of_pixels(arm, images, cluster_size)
    t = arm.tokens_per_cluster
    with torch.no_grad():
        before = arm(images)
        for k in range(arm.num_clusters):
            changed = images.clone()
            changed[..., which == k] += torch.randn(2, 3, int((which == k).sum()))
            after = arm(changed)
            assert torch.equal(after[:, : k * t], before[:, : k * t])  # rows of clusters 1..k
            if k < arm.num_clusters - 1:
                assert not torch.equal(after[:, k * t :], before[:, k * t :])


@pytest.mark.parametrize(("image_size", "patch_size", "cluster_size"), GEOMETRIES)
def test_targets_are_the_standardised_pixels_of_every_cluster_but_the_first(
    image_size, patch_size, cluster_size
) -> None:
    arm = build(image_size, patch_size, cluster_size)
    images = torch.randn(1, 3, *image_size)
    expected = []
    for top in range(0, image_size[0], cluster_size):
        for left in range(0, image_size[1], cluster_size):
            for y in range(top, top + cluster_size, patch_size):
                for x in range(left, left + cluster_size, patch_size):
                    patch = images[0, :, y : y + patch_size, x : x + patch_size].permute(1, 2, 0).flatten()
                    expected.append((patch - patch.mean()) / (patch.var() + 1e-6).sqrt())
    torch.testing.assert_close(arm.targets(images)[0], torch.stack(expected)[arm.tokens_per_cluster :])


def test_predicting_nothing_scores_one_minus_one_over_the_values_of_a_patch() -> None:
    arm = build((48, 48), 16, 16)
    targets = arm.targets(torch.randn(4, 3, 48, 48))
    assert pixel_loss(torch.zeros_like(targets), targets).mean().item() == pytest.approx(767 / 768, abs=1e-4)


def test_flat_patches_ask_for_nothing() -> None:
    arm = build()
    assert arm.targets(torch.full((1, 3, 32, 32), 0.7)).abs().max() < 1e-3


def test_the_mask_of_eight_groups_has_36_of_64_blocks_open_and_no_empty_row() -> None:
    mask = block_causal_mask(8, 16)
    assert mask.shape == (128, 128)
    assert mask.sum() == 36 * 16 * 16
    assert [int(n) for n in mask.sum(1)[::16]] == [16 * (i + 1) for i in range(8)]


def test_true_predictions_reconstruct_the_image() -> None:
    arm = build((16, 48), 4, 8)
    images = torch.randn(2, 3, 16, 48)
    torch.testing.assert_close(arm.reconstruct(images, arm.targets(images)), images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, (6, 8, 10, 12)), (24, (12, 16, 20, 24)), (36, (18, 24, 30, 36)), (1, (1,))]
)
def test_default_taps(depth: int, taps: tuple[int, ...]) -> None:
    assert default_taps(depth) == taps


def test_every_weight_learns() -> None:
    arm = build().train()
    images = torch.randn(2, 3, 32, 32)
    pixel_loss(arm(images), arm.targets(images)).mean().backward()
    assert [
        n for n, p in arm.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ] == []
