"""EfficientViM (Lee, Choi, Kim, CVPR 2025): depthwise convolutions, and a mixer whose channel mixing happens on N hidden states.

Every ablation of the supplement's Table C is an argument. Parameters are named as in the released checkpoints and timm's
port, with norms as vectors like timm's. Deviations, on purpose: images of any height and width; the importance's offset `A`
is kept for the checkpoints alone, since a softmax over the tokens does not see it; drop path, which the paper has not.

Shapes: B images, D channels, H x W positions, L = H W, N hidden states, E = expand x D, K classes.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.efficientvim.mixers import MIXERS, ChannelNorm, Mixer
from pipeline.models.recompute import count_images_once
from pipeline.models.vision_mamba import DropPath

if TYPE_CHECKING:
    from pipeline.models.efficientvim.fused import FusedEfficientViM


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU where `act`."""

    def __init__(
        self, channels: int, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, act: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.act else x


def depthwise(channels: int) -> ConvNorm:
    return ConvNorm(channels, channels, 3, groups=channels)


class Stem(nn.Module):
    """Four convolutions; the first log2(`stride`) of them halve the map."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        widths = [channels, width // 8, width // 4, width // 2, width]
        self.conv = nn.Sequential(
            *(ConvNorm(widths[i], widths[i + 1], 3, 2 if 2 ** (i + 1) <= stride else 1, act=i < 3) for i in range(4))
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Downsample(nn.Module):
    """(B, D, H, W) -> (B, out, ceil(H/2), ceil(W/2)); the two depthwise residuals are plain sums, without gates."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        hidden = 4 * out
        self.conv = nn.Sequential(
            ConvNorm(channels, hidden, act=True),
            ConvNorm(hidden, hidden, 3, 2, groups=hidden, act=True),
            SqueezeExcite(hidden, out),
            ConvNorm(hidden, out),
        )
        self.dwconv1, self.dwconv2 = depthwise(channels), depthwise(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)


class FFN(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = ConvNorm(channels, hidden, act=True), ConvNorm(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """Depthwise, mixer, depthwise, FFN; each is mixed with its input per channel: x <- x + sigmoid(alpha) (f(x) - x)."""

    def __init__(
        self, channels: int, *, mixer: Mixer, norm: nn.Module, mlp_ratio: float, gate_init: float, drop_path: float
    ) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.dwconv1, self.dwconv2 = depthwise(channels), depthwise(channels)
        self.ffn = FFN(channels, int(mlp_ratio * channels))
        self.alpha = nn.Parameter(torch.full((4, channels), gate_init))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W) -> the same, and the mixer's hidden states (B, D, N) if it has any."""
        gates = self.alpha.sigmoid()[:, :, None, None].unbind()
        x = x + self.drop_path(gates[0] * (self.dwconv1(x) - x))
        mixed, hidden = self.mixer(self.norm(x))
        x = x + self.drop_path(gates[1] * (mixed - x))
        x = x + self.drop_path(gates[2] * (self.dwconv2(x) - x))
        return x + self.drop_path(gates[3] * (self.ffn(x) - x)), hidden


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map after the last block, and that block's hidden states; `downsample` comes after."""
        hidden = None
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x, hidden = checkpoint(block, x, use_reentrant=False)
            else:
                x, hidden = block(x)
        return x, hidden


class EfficientViM(nn.Module):
    """Backbone and classifier in timm's language; every argument is a field of `EfficientViMConfig`.

    With `distilled` there is a second set of heads: answers are the average of both, and in training, after
    `set_distilled_training()`, the pair (logits, logits for the teacher).
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        in_chans: int,
        drop_path: float,
        num_classes: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        states: tuple[int, ...],
        stem_stride: int,
        mlp_ratio: float,
        expand: int,
        mixer: str,
        importance: str,
        heads: int,
        fusion: Literal["hidden", "map", "none"],
        norm: Literal["partial_ln", "bn"],
        distilled: bool,
        gate_init: float,
    ) -> None:
        super().__init__()
        self.image_size, self.fusion, self.distilled = image_size, fusion, distilled
        self.depths, self.depth, self.distilled_training = depths, sum(depths), False
        rates = iter([drop_path * i / max(1, self.depth - 1) for i in range(self.depth)])
        self.patch_embed = Stem(in_chans, widths[0], stem_stride)

        def block(width: int, num_states: int) -> Block:
            return Block(
                width,
                mixer=MIXERS[mixer](width, num_states, expand=expand, importance=importance, heads=heads),
                norm=nn.BatchNorm2d(width) if norm == "bn" else ChannelNorm(width),
                mlp_ratio=mlp_ratio,
                gate_init=gate_init,
                drop_path=next(rates),
            )

        last = len(widths) - 1
        self.stages = nn.ModuleList(
            Stage([block(d, n) for _ in range(depth)], Downsample(d, widths[i + 1]) if i < last else None)
            for i, (d, depth, n) in enumerate(zip(widths, depths, states, strict=True))
        )
        # hidden: the states of each stage and the last map; map: the map of each stage; none: the last map.
        read = {"hidden": [*widths, widths[-1]], "map": list(widths), "none": [widths[-1]]}[fusion]
        self.feature_widths, self.num_features = read, sum(read)
        self.norm = nn.ModuleList(nn.BatchNorm1d(d) if norm == "bn" else ChannelNorm(d) for d in read)
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As released: linear layers truncated normal 0.02, convolutions torch's own, batch norms at one."""
        for module in self.modules():
            if isinstance(module, Block):
                module.mixer.reset_parameters()

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        for suffix in ("", "_dist") if self.distilled else ("",):
            heads = [nn.Linear(d, num_classes) if num_classes else nn.Identity() for d in self.feature_widths]
            for head in heads:
                if isinstance(head, nn.Linear):
                    nn.init.trunc_normal_(head.weight, std=0.02)
                    nn.init.zeros_(head.bias)
            self.add_module(f"heads{suffix}", nn.ModuleList(heads))
            if len(heads) > 1:
                self.register_parameter(f"weights{suffix}", nn.Parameter(torch.ones(len(heads))))

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, answer with the pair (logits, logits for the teacher)."""
        self.distilled_training = enable and self.distilled

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        count_images_once(self)
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    def run_stages(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each stage's last map (B, D, H, W) and its hidden states (B, D, N) if its mixer has any."""
        x = self.patch_embed(images)
        for stage in cast(Iterable[Stage], self.stages):
            x, hidden = stage(x)
            yield x, hidden
            if stage.downsample is not None:
                x = stage.downsample(x)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> what the heads read, normalised, not pooled: one (B, D, columns) each."""
        maps, hidden = zip(*self.run_stages(images), strict=True)
        read = {"hidden": [*hidden, maps[-1]], "map": maps, "none": maps[-1:]}[self.fusion]
        return [norm(x.flatten(2)) for norm, x in zip(self.norm, read, strict=True)]

    def forward_intermediates(self, images: Tensor, indices: tuple[int, ...] = (1, 2, 3)) -> list[Tensor]:
        """The maps (B, D, H, W) after the stages `indices`, counted from 1, not normalised."""
        return [x for i, (x, _) in enumerate(self.run_stages(images), start=1) if i in indices]

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Any:
        """Logits (B, K), or what the heads read, pooled: (B, num_features)."""
        pooled = [x.mean(-1) for x in features]
        if pre_logits or not self.num_classes:
            return torch.cat(pooled, dim=1)
        logits = self._fuse(pooled, "")
        if not self.distilled:
            return logits
        taught = self._fuse(pooled, "_dist")
        return (logits, taught) if self.distilled_training and self.training else (logits + taught) / 2

    def forward(self, images: Tensor) -> Any:
        """(B, C, H, W) -> logits (B, K)."""
        return self.forward_head(self.forward_features(images))

    def _fuse(self, pooled: list[Tensor], suffix: str) -> Tensor:
        heads = self.get_submodule(f"heads{suffix}")
        answers = [head(x) for head, x in zip(heads.children(), pooled, strict=True)]
        if len(answers) == 1:
            return answers[0]
        weights = self.get_parameter(f"weights{suffix}").softmax(0).unbind()
        total = weights[0] * answers[0]
        for weight, answer in zip(weights[1:], answers[1:], strict=True):
            total = total + weight * answer
        return total

    def fuse(self) -> "FusedEfficientViM":
        """The same function for inference alone, equal to rounding; its batch norms must have been trained."""
        from pipeline.models.efficientvim.fused import FusedEfficientViM

        return FusedEfficientViM(self)

    def no_weight_decay(self) -> set[str]:
        """Nothing but vectors is spared, as in the released recipe (which decays the gates, and the norms' weights too)."""
        return set()

    def layer_of(self, name: str) -> int:
        """For layer-wise decay: 0 for the stem, i + 1 for block i, a downsampler with the block before it, then the heads."""
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "stages":
            return self.depth + 1
        stage = int(parts[1])
        return sum(self.depths[:stage]) + (int(parts[3]) + 1 if parts[2] == "blocks" else self.depths[stage])

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A released state dict under this model's shapes: the released norms are (1, D, 1) or (1, D, 1, 1)."""
        wanted = self.state_dict()
        return {
            k: v.reshape(wanted[k].shape) if ".norm." in f".{k}" and k in wanted and v.dim() > 1 else v
            for k, v in weights.items()
        }

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of what fine-tuning may make anew."""
        return "heads.", "heads_dist.", "weights_dist"
