"""A Vision Mamba for images of any size: its position embedding is resized, and its orders are computed, in each call."""

from typing import Literal

from torch import Tensor, nn

from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.position_embedding import resize_position_embedding
from pipeline.models.vision_mamba.tokens import cluster_order, column_order


class AnySize(nn.Module):
    """Gives the logits of a model of the images' size that started from `model` (`pipeline.exports.transfer`).

    Args:
        model: The model, whose weights are shared.
        order: As in the model's config.
        cluster_size: As in the model's config, in pixels.
    """

    def __init__(self, model: VisionMamba, order: Literal["raster", "cluster"], cluster_size: int) -> None:
        super().__init__()
        self.model = model
        self.side = cluster_size // model.patch_size if order == "cluster" else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K). H and W are at least a patch, and multiples of a cluster where clusters are scanned."""
        model = self.model
        patches = model.patch_embed.proj(images)  # (B, D, rows, across)
        grid = (patches.shape[2], patches.shape[3])
        at = model.cls_index_of(grid[0] * grid[1])
        x = patches.flatten(2).transpose(1, 2) + resize_position_embedding(
            model.pos_embed, model.grid_size, grid, source_cls=model.cls_index
        )
        if self.side is not None:
            x = x[:, cluster_order(grid, self.side)]
        x = model.with_cls(x, at)
        columns = None if model.columns is None else column_order(grid, self.side, at)
        blend = model.blend_for(images)
        for layer in model.layers:
            x = layer(x, columns, blend)
        return model.head(model.pooled(model.norm_f(x), at))
