"""ARM: autoregressive pretraining of a Vision Mamba (Ren et al. 2024, "Autoregressive Pretraining with Mamba in Vision").

The backbone reads all clusters but the last, in one direction. A decoder of cross-attention blocks predicts the pixels of
each next cluster from the clusters before it. Every size follows from the geometry: with K clusters of T tokens the backbone
reads (K - 1) T tokens, and (K - 1) T are predicted, for any K and T.

Deviation: with order=raster a cluster is T patches one after another along the rows, so that pretraining scans in the same
order as fine-tuning.

Shapes: B images, C channels, K clusters, T tokens of a cluster, S = (K - 1) T, W decoder width, P = C x pixels of a patch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.config import DecoderConfig, VisionMambaConfig, check_clusters, check_taps, default_taps
from pipeline.models.layers import mlp
from pipeline.models.variants import PRETRAINING_FORM
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.position_embedding import sincos_position_embedding
from pipeline.models.vision_mamba.tokens import cluster_order
from pipeline.ops.linear import Linear


class CrossAttentionBlock(nn.Module):
    """q + Attention(LN(q), LN(kv)), then q + MLP(LN(q)); there is no attention among the queries.

    Args:
        width: W.
        num_heads: Heads of the attention.
        mlp_ratio: Hidden channels of the MLP over W.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv, self.proj = Linear(width, width), Linear(width, 2 * width), Linear(width, width)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """Let queries (B, S, W) attend to features (B, S, W) where `mask` (S, S) is true: (B, S, W)."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        keys, values = self.kv(self.norm_kv(kv)).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            heads(self.q(self.norm_q(q))), heads(keys), heads(values), attn_mask=mask
        )
        q = q + self.proj(attended.transpose(1, 2).flatten(2))
        return q + self.mlp(self.norm_mlp(q))


class ARM(nn.Module):
    """A backbone in its pretraining form, and the decoder: `forward` predicts what `targets` computes.

    Args:
        backbone: Its config; the fields in `PRETRAINING_FORM` are overridden.
        decoder: Its config.

    Raises:
        ValueError: The grid does not consist of whole clusters, or the decoder reads blocks that do not exist.
    """

    mask: Tensor
    pixel_order: Tensor
    position_embedding: Tensor

    def __init__(self, backbone: VisionMambaConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        check_clusters(backbone)
        check_taps(decoder, backbone)
        self.backbone = VisionMamba(**backbone.arguments() | PRETRAINING_FORM)
        self.backbone.norm_f = nn.Identity()  # the taps below have norms of their own
        width, dim, grid = decoder.width, backbone.embed_dim, backbone.grid_size
        side = backbone.cluster_size // backbone.patch_size
        self.patch_size = backbone.patch_size
        self.tokens_per_cluster = side * side
        self.num_clusters = grid[0] * grid[1] // self.tokens_per_cluster
        self.taps = decoder.taps or default_taps(backbone.depth)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.taps)
        self.to_decoder = Linear(len(self.taps) * dim, width * decoder.depth)
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(width, decoder.num_heads, decoder.mlp_ratio) for _ in range(decoder.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.to_pixels = Linear(width, backbone.patch_size**2 * backbone.in_chans)
        with torch.device("cpu"):  # real on the meta device too: no state dict would bring them
            order = cluster_order(grid, side if backbone.order == "cluster" else 1)
            embedding = sincos_position_embedding(grid, width)[:, order[self.tokens_per_cluster :]]
            mask = block_causal_mask(self.num_clusters - 1, self.tokens_per_cluster)
        self.register_buffer("pixel_order", order, persistent=False)
        self.register_buffer("position_embedding", embedding, persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self._reset_decoder()

    def _reset_decoder(self) -> None:
        for module in [self.to_decoder, self.to_pixels]:
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            nn.init.zeros_(module.bias)
        for linear in self.blocks.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the features (B, S, taps x D) of clusters 0..K-2, which the decoder and a linear probe read."""
        tokens = self.backbone.embed(images)[:, : -self.tokens_per_cluster]
        _, taps = self.backbone.encode(tokens, self.taps)
        return torch.cat([norm(tap) for norm, tap in zip(self.norms, taps, strict=True)], dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> predictions (B, S, P) of clusters 1..K-1, in cluster order, in standardised pixels."""
        # Interleaved, as in the released weights: block j reads channels j, j + depth, j + 2 depth, ...
        mixtures = self.to_decoder(self.encode(images)).unflatten(-1, (-1, len(self.blocks))).unbind(-1)
        x = (self.query + self.position_embedding).expand(images.shape[0], -1, -1)
        for block, mixture in zip(self.blocks, mixtures, strict=True):
            x = block(x, mixture, self.mask)
        return self.to_pixels(self.norm(x))

    def targets(self, images: Tensor) -> Tensor:
        """Compute the pixels of clusters 1..K-1, each patch standardised by its own mean and variance: (B, S, P)."""
        return standardise(self.patches(images))[:, self.tokens_per_cluster :]

    def patches(self, images: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into patches (B, K T, P), in cluster order; a patch's values are (row, column, channel)."""
        p = self.patch_size
        x = images.unfold(2, p, p).unfold(3, p, p)  # (B, C, rows, across, p, p)
        return x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)[:, self.pixel_order]

    def draw(self, values: Tensor, images: Tensor) -> Tensor:
        """Arrange targets or predictions (B, S, P) as images (B, C, H, W) with the mean and contrast of the true patches.

        A target has neither, so a person could not recognise it. Cluster 0, which is never predicted, is that of `images`.
        """
        patches = self.patches(images).float()
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        first = self.tokens_per_cluster
        drawn = values.float() * (variance[:, first:] + 1e-6).sqrt() + mean[:, first:]
        patches = torch.cat([patches[:, :first], drawn], dim=1)
        p = self.patch_size
        x = patches[:, self.pixel_order.argsort()].unflatten(1, self.backbone.grid_size).unflatten(3, (p, p, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set it for the backbone; the decoder is small."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices exempt from weight decay: the query, and those of the backbone."""
        return {"query"} | {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise decay: the backbone's layers, then one for the whole decoder."""
        inside = name.removeprefix("backbone.")
        return self.backbone.layer_of(inside) if inside != name else self.backbone.depth + 1


def standardise(patches: Tensor) -> Tensor:
    """Subtract the mean of the last axis and divide by the root of its unbiased variance + 1e-6, in fp32 (as ARM does)."""
    variance, mean = torch.var_mean(patches.float(), dim=-1, keepdim=True)
    return (patches.float() - mean) * (variance + 1e-6).rsqrt()


def pixel_loss(predictions: Tensor, targets: Tensor, clusters: int) -> Tensor:
    """Average the squared error over the pixels and tokens of each cluster, in fp32; the mean of the result is ARM's loss.

    Predicting zeros scores (P - 1) / P on patches that vary. Flat patches have zeros as targets.

    Args:
        predictions: (B, S, P).
        targets: (B, S, P).
        clusters: K - 1, the number of predicted clusters.

    Returns:
        (B, clusters).
    """
    errors = F.mse_loss(predictions.float(), targets, reduction="none").mean(2)
    return errors.unflatten(1, (clusters, -1)).mean(2)


def block_causal_mask(num_groups: int, tokens_per_group: int) -> Tensor:
    """Build the decoder's mask: query group i, which predicts cluster i + 1, may attend to the clusters 0..i.

    Args:
        num_groups: K - 1.
        tokens_per_group: T.

    Returns:
        (S, S) bool, true where attention is allowed.
    """
    group = torch.arange(num_groups).repeat_interleave(tokens_per_group)
    return group[:, None] >= group[None, :]
