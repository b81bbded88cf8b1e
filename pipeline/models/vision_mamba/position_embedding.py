"""Position embeddings of a grid of patches: the fixed sin-cos table, and resizing to another grid.

Shapes: D width; a grid is (rows, across) patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.vision_mamba.tokens import drop_token


def sincos_position_embedding(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Compute the fixed 2-D position embedding that ARM pretrains with.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos].

    Args:
        grid_size: Patches (rows, across).
        dim: Width D, a multiple of 4.

    Returns:
        (1, rows x across, D) in fp32.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a sin-cos position embedding needs a width that is a multiple of 4, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, across = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    y, x = torch.meshgrid(rows, across, indexing="ij")
    halves = [
        torch.cat([(p.flatten()[:, None] * omega).sin(), (p.flatten()[:, None] * omega).cos()], 1) for p in (x, y)
    ]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def resize_position_embedding(
    embedding: Tensor,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    *,
    source_cls: int | None = None,
    target_cls: int | None = None,
) -> Tensor:
    """Resize a position embedding to another grid with bicubic interpolation.

    The cls token has no place on the grid: its embedding is carried over unchanged, or is zero if the source has none.

    Args:
        embedding: (1, rows x across, D), with one row more where there is a cls token.
        source_grid: Patches (rows, across) of `embedding`.
        target_grid: Patches (rows, across) of the result.
        source_cls: Index of the cls token's row in `embedding`, or None without one.
        target_cls: Index that the cls token's row gets in the result, or None for no such row.

    Returns:
        (1, rows x across, D) of `target_grid`, with one row more if `target_cls` is given.
    """
    cls = torch.zeros_like(embedding[:, :1]) if source_cls is None else embedding[:, source_cls : source_cls + 1]
    patches = embedding if source_cls is None else drop_token(embedding, source_cls)
    if source_grid != target_grid:
        grid = patches.unflatten(1, source_grid).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=target_grid, mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
    if target_cls is None:
        return patches
    return torch.cat([patches[:, :target_cls], cls, patches[:, target_cls:]], dim=1)
