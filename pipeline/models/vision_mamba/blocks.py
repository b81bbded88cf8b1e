"""The layers of Vision Mamba around its mixer: patch embedding, SwiGLU, residual block.

Shapes: B images, L tokens, D width.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.config import SSMixupConfig
from pipeline.models.layers import DropPath
from pipeline.models.vision_mamba.mixer import Mixer
from pipeline.ops.linear import Linear
from pipeline.ops.norm import RMSNorm

NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}


class PatchEmbed(nn.Module):
    """Embed patches with one convolution.

    Args:
        patch_size: Pixels on a side of a patch.
        stride: Pixels from one patch to the next.
        in_chans: Channels of the images.
        dim: D.
    """

    def __init__(self, patch_size: int, stride: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, grid height x grid width, D), row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), with floor(8D/3) hidden channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.w1, self.w2, self.w3 = Linear(dim, hidden), Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """x + Mixer(norm(x)), then x + SwiGLU(norm(x)) if there is an MLP.

    The residual stream x stays in its own dtype (fp32).

    Args:
        dim: D.
        norm: A name of `NORMS`.
        mlp: `none` or `swiglu`.
        drop_path: Probability that an image's branch is dropped in training.
        d_state: See `Mixer`.
        d_conv: See `Mixer`.
        expand: See `Mixer`.
        directions: See `Mixer`.
        combine: See `Mixer`.
        ssmixup: See `Mixer`.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: str,
        mlp: str,
        drop_path: float,
        d_state: int,
        d_conv: int,
        expand: int,
        directions: int,
        combine: Literal["mean", "sum"],
        ssmixup: SSMixupConfig | None = None,
    ) -> None:
        super().__init__()
        self.mixer = Mixer(
            dim,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            directions=directions,
            combine=combine,
            ssmixup=ssmixup,
        )
        self.drop_path = DropPath(drop_path)
        # In the released files Vim's one norm is called `norm`, ARM's two `norm1` and `norm2`.
        if mlp == "none":
            self.norm = NORMS[norm](dim, eps=1e-5)
        else:
            self.norm1, self.norm2 = NORMS[norm](dim, eps=1e-5), NORMS[norm](dim, eps=1e-5)
            self.mlp = SwiGLU(dim)

    def forward(self, x: Tensor, columns: Tensor | None, blend: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `columns` and `blend` are those of `Mixer.forward`."""
        if hasattr(self, "mlp"):
            x = x + self.drop_path(self.mixer(self.norm1(x), columns, blend))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return x + self.drop_path(self.mixer(self.norm(x), columns, blend))
