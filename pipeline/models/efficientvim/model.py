"""EfficientViM (Lee, Choi, Kim, CVPR 2025): depthwise convolutions, and a mixer that mixes channels on N hidden states.

Every ablation of the supplement's Table C is an argument. Parameters are named as in the released checkpoints and timm's
port; norms are vectors, as in timm's.

Deliberate deviations: images have any height and width; the importance's offset `A` is kept only for the checkpoints,
since a softmax over the tokens cancels it; there is drop path, which the paper does not have.

Shapes: B images, C image channels, D channels, H x W pixels of a map, L = H W tokens, N hidden states, K classes.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pipeline.models.efficientvim.blocks import Block, Downsample, Stage, Stem
from pipeline.models.efficientvim.mixers import MIXERS, ChannelNorm
from pipeline.models.layers import drop_path_rates, init_classifier
from pipeline.models.recompute import count_images_once


class EfficientViM(nn.Module):
    """Backbone and classifier with the methods of timm's models.

    The arguments are the fields of `EfficientViMConfig`, which describes them. With `distilled` there is a second set of
    heads. The logits are then the average of both sets; in training, after `set_distilled_training()`, they are the pair
    (logits, logits for the teacher).
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
        rates = iter(drop_path_rates(drop_path, self.depth))
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
        # The heads read: hidden, the states of each stage and the last map; map, each stage's map; none, the last map.
        read = {"hidden": [*widths, widths[-1]], "map": list(widths), "none": [widths[-1]]}[fusion]
        self.feature_widths, self.num_features = read, sum(read)
        self.norm = nn.ModuleList(nn.BatchNorm1d(d) if norm == "bn" else ChannelNorm(d) for d in read)
        self.reset_classifier(num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as released: linear layers truncated normal 0.02, convolutions torch's own, batch norms at one."""
        for module in self.modules():
            if isinstance(module, Block):
                module.mixer.reset_parameters()

    def get_classifier(self) -> nn.Module:
        """Return the heads, those of the distilled form included."""
        return nn.ModuleList([self.get_submodule(f"heads{s}") for s in (("", "_dist") if self.distilled else ("",))])

    def reset_classifier(self, num_classes: int) -> None:
        """Replace all heads and their fusion weights by fresh ones; 0 classes for none."""
        self.num_classes = num_classes
        for suffix in ("", "_dist") if self.distilled else ("",):
            heads = [nn.Linear(d, num_classes) if num_classes else nn.Identity() for d in self.feature_widths]
            for head in heads:
                init_classifier(head)
            self.add_module(f"heads{suffix}", nn.ModuleList(heads))
            if len(heads) > 1:
                self.register_parameter(f"weights{suffix}", nn.Parameter(torch.ones(len(heads))))

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return the pair (logits, logits for the teacher) in training; without `distilled` this changes nothing."""
        self.distilled_training = enable and self.distilled

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the block again there: less memory, more time."""
        count_images_once(self)
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    def run_stages(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each stage's last map (B, D, H, W) and its hidden states (B, D, N) if its mixer has any."""
        x = self.patch_embed(images)
        for stage in cast(Iterable[Stage], self.stages):
            x, hidden = stage(x)
            yield x, hidden
            if stage.downsample is not None:
                x = stage.downsample(x)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute what the heads read from images (B, C, H, W), normalised but not pooled: one (B, D, L or N) each."""
        maps, hidden = zip(*self.run_stages(images), strict=True)
        read = {"hidden": [*hidden, maps[-1]], "map": maps, "none": maps[-1:]}[self.fusion]
        return [norm(x.flatten(2)) for norm, x in zip(self.norm, read, strict=True)]

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Any:
        """Pool the features and classify them.

        Args:
            features: As `forward_features` returns them.
            pre_logits: Return what the heads read.

        Returns:
            Logits (B, K), or the pair described at the class; with `pre_logits` the pooled features (B, num_features).
        """
        pooled = [x.mean(-1) for x in features]
        if pre_logits or not self.num_classes:
            return torch.cat(pooled, dim=1)
        logits = self._logits(pooled, "")
        if not self.distilled:
            return logits
        taught = self._logits(pooled, "_dist")
        return (logits, taught) if self.distilled_training and self.training else (logits + taught) / 2

    def forward(self, images: Tensor) -> Any:
        """(B, C, H, W) -> logits (B, K)."""
        return self.forward_head(self.forward_features(images))

    def _logits(self, pooled: list[Tensor], suffix: str) -> Tensor:
        """Logits (B, K) of one set of heads, weighted by the set's fusion weights."""
        heads = self.get_submodule(f"heads{suffix}")
        logits = [head(x) for head, x in zip(heads.children(), pooled, strict=True)]
        if len(logits) == 1:
            return logits[0]
        weights = self.get_parameter(f"weights{suffix}").softmax(0).unbind()
        total = weights[0] * logits[0]
        for weight, more in zip(weights[1:], logits[1:], strict=True):
            total = total + weight * more
        return total

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices exempt from weight decay: none.

        The optimizer exempts all vectors. The gates decay, as in the released recipe, which decays the norms' weights too.
        """
        return set()

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise decay: 0 for the stem, i + 1 for block i, depth + 1 for the heads.

        A downsampler belongs to the block before it.
        """
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "stages":
            return self.depth + 1
        stage = int(parts[1])
        return sum(self.depths[:stage]) + (int(parts[3]) + 1 if parts[2] == "blocks" else self.depths[stage])

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a released state dict this model's shapes: the released norms are (1, D, 1) or (1, D, 1, 1)."""
        wanted = self.state_dict()
        return {
            k: v.reshape(wanted[k].shape) if ".norm." in f".{k}" and k in wanted and v.dim() > 1 else v
            for k, v in weights.items()
        }

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of the parameters that fine-tuning may initialise anew."""
        return "heads.", "heads_dist.", "weights_dist"
