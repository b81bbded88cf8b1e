"""ARM: what a prediction may depend on, what its targets are, and the loss of predicting zeros."""

import pytest
import torch

from pipeline.models.arm import ARM, block_causal_mask, pixel_loss
from pipeline.models.config import DecoderConfig, VisionMambaConfig, default_taps
from tests.unit.exports import released
from tests.unit.models import oracle

GEOMETRIES = [((32, 32), 4, 8), ((16, 48), 4, 8), ((24, 24), 2, 12), ((64, 32), 8, 16)]


def build(image_size=(32, 32), patch_size=4, cluster_size=8, order="cluster", **more) -> ARM:
    torch.manual_seed(0)
    sizes = {"image_size": image_size, "patch_size": patch_size, "cluster_size": cluster_size, "order": order}
    model = VisionMambaConfig(**({"name": "vim_nano", "embed_dim": 32, "depth": 3} | sizes | more))
    return ARM(model, DecoderConfig(width=32, depth=2, num_heads=2)).eval()


def cluster_of_pixels(image_size: tuple[int, int], patch_size: int, cluster_size: int, order: str) -> torch.Tensor:
    """(H, W): which cluster each pixel belongs to, row by row; or which run of as many patches in raster order."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in image_size), indexing="ij")
    if order == "cluster":
        return y // cluster_size * (image_size[1] // cluster_size) + x // cluster_size
    patch = y // patch_size * (image_size[1] // patch_size) + x // patch_size
    return patch // (cluster_size // patch_size) ** 2


@pytest.mark.parametrize("order", ["cluster", "raster"])
@pytest.mark.parametrize(("image_size", "patch_size", "cluster_size"), GEOMETRIES)
def test_changing_cluster_k_leaves_predictions_of_clusters_1_to_k_bit_identical(
    image_size, patch_size, cluster_size, order
) -> None:
    """So the last cluster, which is only ever predicted, changes no prediction."""
    arm = build(image_size, patch_size, cluster_size, order)
    images = torch.randn(2, 3, *image_size)
    which = cluster_of_pixels(image_size, patch_size, cluster_size, order)
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


def test_the_last_patch_of_a_cluster_moves_no_feature_of_the_patches_before_it() -> None:
    """The backbone is causal by token, inside clusters too."""
    arm = build()
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 4:8, 4:8] += 1  # the fourth patch of cluster 0
    with torch.no_grad():
        before, after = (arm.backbone.forward_features(x) for x in (images, changed))
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.equal(after[:, 3], before[:, 3])


@pytest.mark.parametrize("order", ["cluster", "raster"])
@pytest.mark.parametrize("name", ["vim_tiny", "arm_base"])
@pytest.mark.parametrize("image_size", [(32, 32), (16, 48)])
def test_predictions_equal_their_equations(name: str, image_size: tuple[int, int], order: str) -> None:
    """In float64, from the weights under their released names."""
    arm = build(image_size, 4, 8, order, name=name, embed_dim=16, depth=12).double()
    arm.position_embedding = arm.position_embedding.double()
    state = released.under_released_names(arm)
    images = torch.randn(2, 3, *image_size, dtype=torch.float64)
    side = 2 if order == "cluster" else None
    expected = oracle.predict(state, images, side=side, group=4, heads=2, taps=(6, 8, 10, 12))
    torch.testing.assert_close(arm(images), expected, rtol=1e-8, atol=1e-8)


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
    loss = pixel_loss(torch.zeros_like(targets), targets, clusters=8)
    assert loss.shape == (4, 8)
    assert loss.mean().item() == pytest.approx(767 / 768, abs=1e-4)


def test_flat_patches_ask_for_nothing() -> None:
    arm = build()
    assert arm.targets(torch.full((1, 3, 32, 32), 0.7)).abs().max() < 1e-3


def test_the_mask_of_eight_groups_has_36_of_64_blocks_open_and_no_empty_row() -> None:
    mask = block_causal_mask(8, 16)
    assert mask.shape == (128, 128)
    assert mask.sum() == 36 * 16 * 16
    assert [int(n) for n in mask.sum(1)[::16]] == [16 * (i + 1) for i in range(8)]


def test_the_loss_of_a_cluster_is_the_mean_over_its_tokens_and_pixels() -> None:
    predictions, targets = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    found = pixel_loss(predictions, targets, clusters=3)
    for image in range(2):
        for k in range(3):
            own = slice(2 * k, 2 * k + 2)
            torch.testing.assert_close(found[image, k], (predictions - targets)[image, own].square().mean())
    torch.testing.assert_close(found.mean(), (predictions - targets).square().mean())


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, (6, 8, 10, 12)), (24, (12, 16, 20, 24)), (36, (18, 24, 30, 36)), (1, (1,))]
)
def test_default_taps(depth: int, taps: tuple[int, ...]) -> None:
    assert default_taps(depth) == taps


def test_every_weight_learns() -> None:
    arm = build().train()
    images = torch.randn(2, 3, 32, 32)
    pixel_loss(arm(images), arm.targets(images), arm.num_clusters - 1).mean().backward()
    assert [
        n for n, p in arm.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ] == []


@pytest.mark.parametrize("order", ["cluster", "raster"])
@pytest.mark.parametrize(("image_size", "patch_size", "cluster_size"), GEOMETRIES)
def test_drawing_the_targets_gives_the_images_and_drawing_zeros_gives_each_patch_its_mean(
    image_size, patch_size, cluster_size, order
) -> None:
    arm = build(image_size, patch_size, cluster_size, order)
    images = torch.randn(2, 3, *image_size)
    targets = arm.targets(images)
    torch.testing.assert_close(arm.draw(targets, images), images)
    flat = arm.draw(torch.zeros_like(targets), images)
    first = cluster_of_pixels(image_size, patch_size, cluster_size, order) == 0
    torch.testing.assert_close(flat[..., first], images[..., first])
    patches = flat.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (B, C, rows, across, p, p)
    true = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    means = true.mean((1, 4, 5))  # over the colours too
    torch.testing.assert_close(patches.mean((1, 4, 5)), means)
    outside = ~first.unfold(0, patch_size, patch_size).unfold(1, patch_size, patch_size)[..., 0, 0]
    assert patches.std((1, 4, 5))[:, outside].max() < 1e-5
