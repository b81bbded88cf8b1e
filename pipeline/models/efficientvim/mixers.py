"""The token mixers of EfficientViM: HSM-SSD, and NC-SSD and attention for the ablations of its Table C.

All of them are made with the same arguments, which are those of `HSMSSD`; each ignores what it has no use for.

Shapes: B images, D channels, H x W pixels of a map, L = H W tokens, N states, E = expand x D.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.layers import HSMSSD, DepthwiseConv, Pointwise, read_states

# Channels of one head of the attention ablation. The paper does not say; neither parameters nor FLOPs depend on it.
ATTENTION_HEAD = 32


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, D, ...), for each pixel or column on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, ...) -> the same shape."""
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        shape = (-1,) + (1,) * (x.dim() - 2)
        return centred * scale * self.weight.view(shape) + self.bias.view(shape)


class NCSSD(nn.Module):
    """Non-causal SSD with one importance for all states, gated on the tokens: row C of Table C.

    The paper does not publish that row's setting.
    """

    def __init__(self, channels: int, states: int, *, expand: int, importance: str, heads: int) -> None:
        super().__init__()
        self.rows = [states, states, 1]  # rows of B, C and dt
        self.BCdt_proj = Pointwise(channels, sum(self.rows))
        self.dw = DepthwiseConv(sum(self.rows))
        self.hz_proj, self.out_proj = Pointwise(channels, 2 * expand * channels), Pointwise(expand * channels, channels)
        self.A, self.D = nn.Parameter(torch.empty(1)), nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        """Draw A uniformly from [1, 16]."""
        nn.init.uniform_(self.A, 1, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Mix a normalised map (B, D, H, W); there are no hidden states to return."""
        tokens = x.flatten(2)
        b, c, dt = self.dw(self.BCdt_proj(tokens).view(x.shape[0], -1, *x.shape[2:])).flatten(2).split(self.rows, 1)
        values, z = self.hz_proj(tokens).chunk(2, dim=1)
        y = read_states(values, b, (dt + self.A[:, None]).softmax(-1)) @ c
        return self.out_proj(y * F.silu(z) + y * self.D).view(x.shape), None


class Attention(nn.Module):
    """Softmax attention without biases: row D of Table C."""

    def __init__(self, channels: int, states: int, *, expand: int, importance: str, heads: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // ATTENTION_HEAD)
        self.qkv, self.out_proj = Pointwise(channels, 3 * channels), Pointwise(channels, channels)

    def reset_parameters(self) -> None:
        """Leave the convolutions as torch initialises them."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Mix a normalised map (B, D, H, W); there are no hidden states to return."""
        qkv = self.qkv(x.flatten(2)).unflatten(1, (3, self.num_heads, -1))  # (B, 3, heads, D / heads, L)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(-1, -2).flatten(1, 2)).view(x.shape), None


Mixer = HSMSSD | NCSSD | Attention
MIXERS: dict[str, Callable[..., Mixer]] = {"hsm": HSMSSD, "ncssd": NCSSD, "attention": Attention}
