"""VSSD (Shi, Dong, Xu 2024): non-causal state space duality in stages 1 to 3, attention in stage 4.

It is written from a description of the method and reads no released weights (they carry no licence). `mixer=hsm` puts
EfficientViM's mixer in place of NC-SSD: Table D of that paper. Every halving rounds up, so images may have any size.

Shapes: B images, C image channels, D channels, H x W pixels of a map, L = H W tokens, E = expand x D, N states of a head,
K classes.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.layers import (
    HSMSSD,
    DropPath,
    PooledClassifier,
    drop_path_rates,
    init_classifier,
    init_step_size_bias,
    mlp,
)
from pipeline.ops.linear import Linear


def conv(channels: int, out: int, kernel: int, stride: int = 1, *, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch norm, and ReLU if `act`."""
    layers = [nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *[nn.ReLU()] * act)


class Stem(nn.Module):
    """Convolutions that reduce the image to a quarter of its sides.

    Args:
        channels: C.
        width: D.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.first = conv(channels, half, 3, 2)
        self.residual = nn.Sequential(conv(half, half, 3), conv(half, half, 3, act=False))
        self.last = nn.Sequential(conv(half, 4 * width, 3, 2), conv(4 * width, width, 1, act=False))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H / 4, W / 4)."""
        x = self.first(images)
        return self.last(x + self.residual(x))


class Downsample(nn.Sequential):
    """(B, D, H, W) -> (B, 2D, H / 2, W / 2).

    That the last convolution has a bias is inferred: only so do the published parameter counts come out.
    """

    def __init__(self, width: int) -> None:
        hidden = 8 * width
        super().__init__(
            *(nn.Conv2d(width, hidden, 1), nn.ReLU()),
            *(nn.Conv2d(hidden, hidden, 3, 2, 1, groups=hidden), nn.ReLU()),
            *(nn.Conv2d(hidden, 2 * width, 1), nn.BatchNorm2d(2 * width)),
        )


class NCSSD(nn.Module):
    """Non-causal SSD: each head sums its tokens, weighted by step size x |A|, into N states and reads them out.

    The gate has no SiLU.

    Args:
        width: D.
        heads: Heads that E is split into.
        states: N.
        expand: E / D.
    """

    def __init__(self, width: int, *, heads: int, states: int, expand: int) -> None:
        super().__init__()
        self.inner, self.states, self.heads = expand * width, states, heads
        self.in_proj = Linear(width, 2 * self.inner + 2 * states + heads, bias=False)
        mixed = self.inner + 2 * states
        self.conv2d = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.norm, self.out_proj = nn.LayerNorm(self.inner), Linear(self.inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw step sizes log-uniform in [1e-3, 0.1] and |A| uniform in [1, 16]; set D to 1."""
        init_step_size_bias(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same shape."""
        z, xbc, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.states, self.heads], -1)
        xbc = F.silu(self.conv2d(xbc.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)  # (B, L, ...)
        values, b, c = xbc.split([self.inner, self.states, self.states], -1)
        values = values.unflatten(-1, (self.heads, -1))  # (B, L, heads, E / heads)
        weight = F.softplus(dt.flatten(1, 2) + self.dt_bias) * self.A_log.exp()
        hidden = b.transpose(1, 2) @ (values * weight[..., None]).flatten(2)  # (B, N, E)
        y = c @ hidden + (values * self.D[:, None]).flatten(2)
        return self.out_proj(self.norm(y).view_as(z) * z)


class Attention(nn.Module):
    """Multi-head attention, without biases in the in-projection and with one in the out-projection."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = Linear(width, 3 * width, bias=False), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same shape."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2)).view_as(x)


class HSM(HSMSSD):
    """EfficientViM's mixer on channels-last maps, without its hidden states."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W, D) -> the same shape."""
        return super().forward(x.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + DW(x), x + mixer(LN(x)), x + DW(x), x + MLP(LN(x)) in turn.

    Args:
        width: D.
        mixer: On channels-last maps (B, H, W, D).
        mlp_ratio: Hidden channels of the MLP over D.
        drop_path: Probability that an image's branch is dropped in training.
    """

    def __init__(self, width: int, mixer: nn.Module, *, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.dw1, self.dw2 = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.norm1, self.norm2, self.mixer = nn.LayerNorm(width), nn.LayerNorm(width), mixer
        self.mlp = mlp(width, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same shape."""
        x = (x + self.dw1(x)).permute(0, 2, 3, 1)
        x = (x + self.drop_path(self.mixer(self.norm1(x)))).permute(0, 3, 1, 2)
        x = (x + self.dw2(x)).permute(0, 2, 3, 1)
        return (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


class VSSD(PooledClassifier):
    """Backbone and classifier with the methods of timm's models.

    The arguments are the fields of `VSSDConfig`, which describes them.
    """

    pixel_axes = (1, 2)

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        in_chans: int,
        drop_path: float,
        num_classes: int,
        width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        states: int,
        expand: int,
        mlp_ratio: float,
        mixer: str,
    ) -> None:
        super().__init__()
        self.image_size, self.depths, self.depth, self.grad_checkpointing = image_size, depths, sum(depths), False
        widths = [width * 2**i for i in range(len(depths))]
        self.num_features = widths[-1]
        rates = iter(drop_path_rates(drop_path, self.depth))

        def mixer_of(stage: int) -> nn.Module:
            if stage == len(depths) - 1:
                return Attention(widths[stage], heads=heads[stage])
            if mixer == "hsm":
                return HSM(widths[stage], states, expand=expand, importance="state", heads=1)
            return NCSSD(widths[stage], heads=heads[stage], states=states, expand=expand)

        self.stem = Stem(in_chans, width)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(w, mixer_of(i), mlp_ratio=mlp_ratio, drop_path=next(rates)) for _ in range(depths[i]))
            for i, w in enumerate(widths)
        )
        self.downsamples = nn.ModuleList(Downsample(w) for w in widths[:-1])
        self.norm = nn.LayerNorm(self.num_features)
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise linear layers with a truncated normal of 0.02, and the scan's parameters as in Mamba-2.

        The method's description states nothing for linear layers; 0.02 is timm's convention.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, NCSSD | HSM):
                module.reset_parameters()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0 classes for none."""
        self.num_classes = num_classes
        self.head = Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_classifier(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the block again there: less memory, more time."""
        self.grad_checkpointing = enable

    def run_stages(self, images: Tensor) -> Iterator[Tensor]:
        """Yield each stage's last map (B, D, H, W)."""
        x = self.stem(images)
        for i, blocks in enumerate(cast(Iterable[nn.ModuleList], self.stages)):
            if i:
                x = self.downsamples[i - 1](x)
            for block in blocks:
                recompute = self.grad_checkpointing and self.training
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            yield x

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H / 32, W / 32, D), normalised."""
        *_, last = self.run_stages(images)
        return self.norm(last.permute(0, 2, 3, 1))

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise decay: 0 for the stem, i + 1 for block i, depth + 1 for the head.

        A downsampler belongs to the block before it.
        """
        parts = name.split(".")
        if parts[0] == "stem":
            return 0
        if parts[0] not in ("stages", "downsamples"):
            return self.depth + 1
        stage = int(parts[1])
        return sum(self.depths[:stage]) + (int(parts[2]) + 1 if parts[0] == "stages" else self.depths[stage])

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict as it is: no released files are read."""
        return weights
