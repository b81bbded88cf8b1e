"""Orders in which the tokens of an image are scanned.

Shapes: B images, L tokens, D width; a grid is (rows, across) patches.
"""

import torch
from torch import Tensor


def cluster_order(grid_size: tuple[int, int], side: int) -> Tensor:
    """List row-major patch indices cluster by cluster (ARM).

    Args:
        grid_size: Patches (rows, across), both multiples of `side`.
        side: Patches on a side of a cluster.

    Returns:
        (rows x across,): clusters row by row, and the patches of a cluster row by row.
    """
    rows, across = grid_size
    index = torch.arange(rows * across).view(rows // side, side, across // side, side)
    return index.permute(0, 2, 1, 3).flatten()


def column_order(grid_size: tuple[int, int], side: int | None, cls_index: int | None) -> Tensor:
    """Find the tokens' places when the grid is read column by column; the cls token keeps its place.

    Clusters have no columns of single tokens: they are read in the cluster order of the transposed grid.

    Args:
        grid_size: Patches (rows, across).
        side: Patches on a side of a cluster, or None where the scan is row-major.
        cls_index: Index of the cls token among the tokens, or None without one.

    Returns:
        (2, L): the order, and its inverse.
    """
    rows, across = grid_size
    columns = torch.arange(rows * across).view(rows, across).t().flatten()
    if side is not None:
        columns = columns[cluster_order((across, rows), side)]
        columns = cluster_order(grid_size, side).argsort()[columns]
    if cls_index is not None:
        columns = columns + (columns >= cls_index).long()
        columns = torch.cat([columns[:cls_index], columns.new_full((1,), cls_index), columns[cls_index:]])
    return torch.stack([columns, columns.argsort()])


def drop_token(x: Tensor, index: int) -> Tensor:
    """Tokens (B, L, D) without the one at `index`: (B, L - 1, D)."""
    return torch.cat([x[:, :index], x[:, index + 1 :]], dim=1)
