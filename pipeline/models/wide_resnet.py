"""Wide residual networks for small images (Zagoruyko and Komodakis 2016), as semi-supervised learning compares them.

WRN-28-2 has 1.47 M parameters for ten classes. The details are those of the FixMatch family and of USB: pre-activation blocks,
leaky ReLU of slope 0.1, batch norms that keep 0.999 of their statistics, and a first block that activates before it branches.
Shapes: B images, C channels, H x W pixels, D = 64 x widen channels of the last map, K classes.
"""

import re
from collections.abc import Iterable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.layers import DropPath, PooledClassifier, drop_path_rates
from pipeline.models.recompute import count_images_once

SLOPE = 0.1
MOMENTUM = 1e-3  # share of a batch in the running statistics of the batch norms
LAST_EPS = 1e-3  # epsilon of the last norm; the others have torch's 1e-5


class Block(nn.Module):
    """norm, activation, 3x3, norm, activation, 3x3, beside the input or its 1x1 projection.

    Args:
        channels: C of the input.
        out: Channels of the output.
        stride: Of the first convolution and of the projection.
        activate_first: Whether the projection sees the activated input too.
        drop_path: Probability that an image's branch is dropped.
    """

    def __init__(self, channels: int, out: int, stride: int, *, activate_first: bool, drop_path: float) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.norm1, self.norm2 = nn.BatchNorm2d(channels, momentum=MOMENTUM), nn.BatchNorm2d(out, momentum=MOMENTUM)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        active = F.leaky_relu(self.norm1(x), SLOPE)
        inner = self.conv2(F.leaky_relu(self.norm2(self.conv1(active)), SLOPE))
        return self.shortcut(active if self.activate_first else x) + self.drop_path(inner)


class WideResNet(PooledClassifier):
    """Backbone and classifier with the methods of timm's models.

    The arguments are the fields of `WideResNetConfig`, which describes them.
    """

    pixel_axes = (2, 3)

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        in_chans: int,
        drop_path: float,
        num_classes: int,
        depth: int,
        widen: int,
    ) -> None:
        super().__init__()
        self.image_size, self.grad_checkpointing = image_size, False
        self.per_stage = (depth - 4) // 6
        self.depth = 3 * self.per_stage
        self.num_features = 64 * widen
        rates = iter(drop_path_rates(drop_path, self.depth))
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1)
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        widths[s] if i == 0 else widths[s + 1],
                        widths[s + 1],
                        2 if s and i == 0 else 1,
                        activate_first=s == i == 0,
                        drop_path=next(rates),
                    )
                    for i in range(self.per_stage)
                )
            )
            for s in range(3)
        )
        self.norm = nn.BatchNorm2d(self.num_features, eps=LAST_EPS, momentum=MOMENTUM)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one (Xavier normal, no bias at first); 0 classes for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.xavier_normal_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the block again there: less memory, more time."""
        count_images_once(self)
        self.grad_checkpointing = enable

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> the last map (B, D, H / 4, W / 4), normalised and activated."""
        x = self.stem(images)
        for stage in cast(Iterable[nn.Sequential], self.stages):
            if self.grad_checkpointing and self.training:
                for block in stage:
                    x = checkpoint(block, x, use_reentrant=False)
            else:
                x = stage(x)
        return F.leaky_relu(self.norm(x), SLOPE)

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise decay: 0 for the stem, i + 1 for block i, depth + 1 for norm and head."""
        parts = name.split(".")
        if parts[0] == "stem":
            return 0
        if parts[0] != "stages":
            return self.depth + 1
        return int(parts[1]) * self.per_stage + int(parts[2]) + 1

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a state dict of USB or of the PyTorch ports of FixMatch this model's names."""
        names = {"conv1": "stem", "bn1": "norm", "classifier": "head", "fc": "head"}
        inside = {"bn1": "norm1", "bn2": "norm2", "convShortcut": "shortcut"}
        found = {}
        for key, value in weights.items():
            block = re.fullmatch(r"block([123])\.layer\.(\d+)\.(\w+)\.(\w+)", key)
            first, _, rest = key.partition(".")
            if block:
                stage, index, part, kind = block.groups()
                key = f"stages.{int(stage) - 1}.{index}.{inside.get(part, part)}.{kind}"
            elif first in names:
                key = f"{names[first]}.{rest}"
            found[key] = value
        return found
