"""Layers and initialisations that several families share.

Shapes: B images, D channels, H x W pixels of a map, L = H W tokens, N hidden states, E = expand x D inner width, K classes.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.linear import Linear


class PooledClassifier(nn.Module, ABC):
    """What networks share whose one linear head reads the mean over a map's pixels, with the methods of timm's models.

    Attributes:
        pixel_axes: The axes of H and W in what `forward_features` returns.
        head: (B, D) -> logits (B, K).
    """

    pixel_axes: tuple[int, int]
    head: nn.Module

    @abstractmethod
    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the last map."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and classify it: logits (B, K), or the pooled (B, D) with `pre_logits`."""
        x = x.mean(self.pixel_axes)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm's models do."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices exempt from weight decay: none; the optimizer exempts all vectors."""
        return set()

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of the parameters that fine-tuning may initialise anew."""
        return ("head.",)


class DropPath(nn.Module):
    """Drop the residual branch of whole images in training (stochastic depth, Huang et al. 2016).

    The kept branches are divided by 1 - rate, so that the mean does not change.

    Args:
        rate: Probability that an image's branch is dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape; the input itself in eval mode."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of `depth` blocks that rise linearly from 0 to `last`, which the last block gets."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def mlp(width: int, ratio: float) -> nn.Sequential:
    """Linear, GELU, linear on (..., width), with int(ratio x width) hidden channels."""
    hidden = int(ratio * width)
    return nn.Sequential(Linear(width, hidden), nn.GELU(), Linear(hidden, width))


def init_classifier(head: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of a linear head, or of several, from a truncated normal and zero the biases.

    Args:
        head: A linear layer, a list of them, or a module without a linear layer, which stays as it is.
        std: Standard deviation of the normal. timm has 0.02; ARM, MAE and Semi-ViT fine-tune from 2e-5.
    """
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_step_size_bias(bias: Tensor) -> None:
    """Fill `bias` so that softplus(bias) is log-uniform in [1e-3, 0.1], as Mamba starts its step sizes."""
    step = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_(min=1e-4)
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class Pointwise(nn.Module):
    """A 1x1 convolution without bias on (B, D, columns); its weight is (out, D, 1), as in the released checkpoints."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, columns) -> (B, out, columns)."""
        return self.conv(x)


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution without bias or norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same shape."""
        return self.conv(x)


def read_states(x: Tensor, b: Tensor, importance: Tensor) -> Tensor:
    """Sum the tokens into hidden states, each token weighted by `b` and by its importance.

    Args:
        x: Tokens (B, D, L).
        b: Weight of each token for each state, (B, N, L).
        importance: (B, N, L) one for each state, (B, 1, L) one for all, or (B, heads, L) one for each head of channels.
            The first two scale `b`, the last scales `x`.

    Returns:
        Hidden states (B, D, N).
    """
    if importance.shape[1] in (1, b.shape[1]):
        return x @ (importance * b).transpose(1, 2)
    weighted = x.unflatten(1, (importance.shape[1], -1)) * importance[:, :, None]
    return weighted.flatten(1, 2) @ b.transpose(1, 2)


class HSMSSD(nn.Module):
    """HSM-SSD, the token mixer of EfficientViM (section 3); VSSD takes it too in Table D of that paper.

    Each state is a weighted sum of all tokens. Channels are mixed and gated on the N states instead of the L tokens;
    then the states are read out at every token. It equals NC-SSD where the read-out is diagonal (supplement, Prop. 1).

    Args:
        channels: D.
        states: N.
        expand: E / D.
        importance: `state`, `vector` or `multihead`: a token's weight for each state, for all states, or for each head.
        heads: Heads of `multihead`.
    """

    def __init__(self, channels: int, states: int, *, expand: int, importance: str, heads: int) -> None:
        super().__init__()
        weights = {"state": states, "vector": 1, "multihead": heads}[importance]
        self.rows = [states, states, weights]  # rows of B, C and dt
        self.BCdt_proj = Pointwise(channels, sum(self.rows))
        self.dw = DepthwiseConv(sum(self.rows))
        self.hz_proj, self.out_proj = Pointwise(channels, 2 * expand * channels), Pointwise(expand * channels, channels)
        self.A, self.D = nn.Parameter(torch.empty(weights)), nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        """Draw A uniformly from [1, 16]; D is 1 and the convolutions are torch's own."""
        nn.init.uniform_(self.A, 1, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a normalised map (B, D, H, W).

        Returns:
            The mixed map (B, D, H, W), and the hidden states (B, D, N) before the read-out.
        """
        tokens = x.flatten(2)
        b, c, dt = self.dw(self.BCdt_proj(tokens).view(x.shape[0], -1, *x.shape[2:])).flatten(2).split(self.rows, 1)
        # The softmax over tokens cancels A; it is kept because the released files have it.
        importance = (dt + self.A[:, None]).softmax(-1)
        h = self.mix(read_states(tokens, b, importance))
        return (h @ c).view(x.shape), h

    def mix(self, states: Tensor) -> Tensor:
        """Mix the channels of states (B, D, N): W_out (h SiLU(z) + D h) with [h; z] = W_hz states."""
        h, z = self.hz_proj(states).chunk(2, dim=1)
        return self.out_proj(h * F.silu(z) + h * self.D)
