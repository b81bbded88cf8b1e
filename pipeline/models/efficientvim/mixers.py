"""The token mixers of EfficientViM and of its ablations: HSM-SSD, NC-SSD, attention.

HSM-SSD (paper, section 3; supplement, Prop. 1): every state weighs all tokens, channels are mixed and gated on the N states
instead of the L tokens, and the states are read out. Equal to NC-SSD where the read-out is diagonal.

Shapes: B images, D channels, H x W positions, L = H W, N states, E = expand x D.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels a head of the attention ablation. The paper does not say; neither parameters nor FLOPs depend on it.
ATTENTION_HEAD = 32


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, D, ...), at every position."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        shape = (-1,) + (1,) * (x.dim() - 2)
        return centred * scale * self.weight.view(shape) + self.bias.view(shape)


class Pointwise(nn.Module):
    """A 1x1 convolution without bias on (B, D, columns); its weight is (out, D, 1), as in the released checkpoints."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DepthwiseConv(nn.Module):
    """3x3, no bias, no norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def read_states(x: Tensor, b: Tensor, importance: Tensor) -> Tensor:
    """Hidden states (B, D, N) = sum over tokens of x (B, D, L), b (B, N, L) and the importance (B, N | 1 | heads, L).

    One importance a state or one for all weighs b; one a head of channels weighs x.
    """
    if importance.shape[1] in (1, b.shape[1]):
        return x @ (importance * b).transpose(1, 2)
    weighed = x.unflatten(1, (importance.shape[1], -1)) * importance[:, :, None]
    return weighed.flatten(1, 2) @ b.transpose(1, 2)


class HSMSSD(nn.Module):
    """x (B, D, H, W), normalised -> (mixed (B, D, H, W), hidden states (B, D, N) before the read-out)."""

    def __init__(self, channels: int, states: int, *, expand: int, importance: str, heads: int) -> None:
        super().__init__()
        weights = {"state": states, "vector": 1, "multihead": heads}[importance]
        self.rows = [states, states, weights]  # of B, C and dt
        self.BCdt_proj = Pointwise(channels, sum(self.rows))
        self.dw = DepthwiseConv(sum(self.rows))
        self.hz_proj, self.out_proj = Pointwise(channels, 2 * expand * channels), Pointwise(expand * channels, channels)
        self.A, self.D = nn.Parameter(torch.empty(weights)), nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.A, 1, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(2)
        b, c, dt = self.dw(self.BCdt_proj(tokens).view(len(x), -1, *x.shape[2:])).flatten(2).split(self.rows, 1)
        importance = (dt + self.A[:, None]).softmax(-1)  # which A does not change; it is in the released files
        h = self.mix(read_states(tokens, b, importance))
        return (h @ c).view(x.shape), h

    def mix(self, states: Tensor) -> Tensor:
        """All that happens between channels: W_out (h SiLU(z) + D h), [h; z] = W_hz states, (B, D, N) both."""
        h, z = self.hz_proj(states).chunk(2, dim=1)
        return self.out_proj(h * F.silu(z) + h * self.D)


class NCSSD(nn.Module):
    """Non-causal SSD with one importance for all states, gated in token space: Table C's row C (setting not published)."""

    def __init__(self, channels: int, states: int, *, expand: int, importance: str, heads: int) -> None:
        super().__init__()
        self.rows = [states, states, 1]
        self.BCdt_proj = Pointwise(channels, sum(self.rows))
        self.dw = DepthwiseConv(sum(self.rows))
        self.hz_proj, self.out_proj = Pointwise(channels, 2 * expand * channels), Pointwise(expand * channels, channels)
        self.A, self.D = nn.Parameter(torch.empty(1)), nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.A, 1, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        tokens = x.flatten(2)
        b, c, dt = self.dw(self.BCdt_proj(tokens).view(len(x), -1, *x.shape[2:])).flatten(2).split(self.rows, 1)
        values, z = self.hz_proj(tokens).chunk(2, dim=1)
        y = read_states(values, b, (dt + self.A[:, None]).softmax(-1)) @ c
        return self.out_proj(y * F.silu(z) + y * self.D).view(x.shape), None


class Attention(nn.Module):
    """Softmax attention without biases: Table C's row D."""

    def __init__(self, channels: int, states: int, *, expand: int, importance: str, heads: int) -> None:
        super().__init__()
        self.num_heads = max(1, channels // ATTENTION_HEAD)
        self.qkv, self.out_proj = Pointwise(channels, 3 * channels), Pointwise(channels, channels)

    def reset_parameters(self) -> None:
        """Nothing beyond the convolutions' own."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        qkv = self.qkv(x.flatten(2)).unflatten(1, (3, self.num_heads, -1))  # (B, 3, heads, D / heads, L)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(-1, -2).flatten(1, 2)).view(x.shape), None


Mixer = HSMSSD | NCSSD | Attention
MIXERS: dict[str, Callable[..., Mixer]] = {"hsm": HSMSSD, "ncssd": NCSSD, "attention": Attention}
