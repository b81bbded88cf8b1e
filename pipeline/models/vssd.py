"""VSSD (Shi, Dong, Xu 2024): non-causal state space duality in stages 1 to 3, attention in stage 4.

Written from a description of the method; no released weights are read (theirs carry no licence). `mixer=hsm` puts
EfficientViM's mixer in place of NC-SSD: Table D of that paper. Sides are rounded up at every halving, so any image will do.

Shapes: B images, D channels, H x W positions, L = H W, E = expand x D, N states a head.
"""

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.efficientvim.mixers import HSMSSD
from pipeline.models.vision_mamba import DropPath


def conv(channels: int, out: int, kernel: int, stride: int = 1, *, act: bool = True) -> nn.Sequential:
    """Convolution, batch norm, ReLU where `act`."""
    layers = [nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, *[nn.ReLU()] * act)


class Stem(nn.Module):
    """(B, C, H, W) -> (B, D, H/4, W/4)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.first = conv(channels, half, 3, 2)
        self.residual = nn.Sequential(conv(half, half, 3), conv(half, half, 3, act=False))
        self.last = nn.Sequential(conv(half, 4 * width, 3, 2), conv(4 * width, width, 1, act=False))

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(x + self.residual(x))


class Downsample(nn.Sequential):
    """(B, D, H, W) -> (B, 2D, H/2, W/2). That the last convolution has a bias too, the published counts say."""

    def __init__(self, width: int) -> None:
        hidden = 8 * width
        super().__init__(
            *(nn.Conv2d(width, hidden, 1), nn.ReLU()),
            *(nn.Conv2d(hidden, hidden, 3, 2, 1, groups=hidden), nn.ReLU()),
            *(nn.Conv2d(hidden, 2 * width, 1), nn.BatchNorm2d(2 * width)),
        )


class NCSSD(nn.Module):
    """Every head sums its tokens, weighted by step size x |A|, into N states and reads them out; the gate has no SiLU."""

    def __init__(self, width: int, *, heads: int, states: int, expand: int) -> None:
        super().__init__()
        self.inner, self.states, self.heads = expand * width, states, heads
        self.in_proj = nn.Linear(width, 2 * self.inner + 2 * states + heads, bias=False)
        mixed = self.inner + 2 * states
        self.conv2d = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.norm, self.out_proj = nn.LayerNorm(self.inner), nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Step sizes log-uniform in [1e-3, 0.1], |A| uniform in [1, 16], D = 1."""
        with torch.no_grad():
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.A_log.uniform_(1, 16).log_()
            self.D.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same."""
        z, xbc, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.states, self.heads], -1)
        xbc = F.silu(self.conv2d(xbc.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)  # (B, L, ...)
        values, b, c = xbc.split([self.inner, self.states, self.states], -1)
        values = values.unflatten(-1, (self.heads, -1))  # (B, L, heads, E / heads)
        weight = F.softplus(dt.flatten(1, 2) + self.dt_bias) * self.A_log.exp()
        hidden = b.transpose(1, 2) @ (values * weight[..., None]).flatten(2)  # (B, N, E)
        y = c @ hidden + (values * self.D[:, None]).flatten(2)
        return self.out_proj(self.norm(y).view_as(z) * z)


class Attention(nn.Module):
    """Multi-head attention without biases in, with one out."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2)).view_as(x)


class HSM(HSMSSD):
    """EfficientViM's mixer on channels-last maps, without its hidden states."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W, D) -> the same."""
        return super().forward(x.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + DW(x), x + mixer(LN(x)), x + DW(x), x + MLP(LN(x))."""

    def __init__(self, width: int, mixer: nn.Module, *, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.dw1, self.dw2 = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))
        self.norm1, self.norm2, self.mixer = nn.LayerNorm(width), nn.LayerNorm(width), mixer
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same."""
        x = (x + self.dw1(x)).permute(0, 2, 3, 1)
        x = (x + self.drop_path(self.mixer(self.norm1(x)))).permute(0, 3, 1, 2)
        x = (x + self.dw2(x)).permute(0, 2, 3, 1)
        return (x + self.drop_path(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


class VSSD(nn.Module):
    """Backbone and classifier in timm's language; every argument is a field of `VSSDConfig`."""

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
        rates = iter([drop_path * i / max(1, self.depth - 1) for i in range(self.depth)])

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
        """Linear layers truncated normal 0.02 (stated for none of them: timm's habit), scan parameters as in Mamba-2."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, NCSSD | HSM):
                module.reset_parameters()

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = head = nn.Linear(self.num_features, num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def run_stages(self, images: Tensor) -> Iterator[Tensor]:
        """Each stage's last map (B, D, H, W)."""
        x = self.stem(images)
        for i, blocks in enumerate(cast(Iterable[nn.ModuleList], self.stages)):
            if i:
                x = self.downsamples[i - 1](x)
            for block in blocks:
                recompute = self.grad_checkpointing and self.training
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            yield x

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/32, W/32, D), normalised."""
        *_, last = self.run_stages(images)
        return self.norm(last.permute(0, 2, 3, 1))

    def forward_intermediates(self, images: Tensor, indices: tuple[int, ...] = (1, 2, 3, 4)) -> list[Tensor]:
        """The maps (B, D, H, W) after the stages `indices`, counted from 1, not normalised."""
        return [x for i, x in enumerate(self.run_stages(images), start=1) if i in indices]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.forward_head(self.forward_features(images))

    def no_weight_decay(self) -> set[str]:
        """Nothing but vectors."""
        return set()

    def layer_of(self, name: str) -> int:
        """For layer-wise decay: 0 for the stem, i + 1 for block i, a downsampler with the block before it, then the head."""
        parts = name.split(".")
        if parts[0] == "stem":
            return 0
        if parts[0] not in ("stages", "downsamples"):
            return self.depth + 1
        stage = int(parts[1])
        return sum(self.depths[:stage]) + (int(parts[2]) + 1 if parts[0] == "stages" else self.depths[stage])

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of what fine-tuning may make anew."""
        return ("head.",)
