"""The layers of EfficientViM around its mixer: stem, block, downsampler.

Shapes: B images, C image channels, D channels, H x W pixels of a map, N hidden states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.efficientvim.mixers import Mixer
from pipeline.models.layers import DropPath


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU if `act`.

    Args:
        channels: Channels of the input.
        out: Channels of the output.
        kernel: Pixels on a side of the kernel; the padding keeps the size of the map.
        stride: Pixels.
        groups: Groups of the convolution.
        act: Whether a ReLU follows.
    """

    def __init__(
        self, channels: int, out: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, act: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out, H / stride, W / stride), rounded up."""
        x = self.norm(self.conv(x))
        return F.relu(x) if self.act else x


def depthwise(channels: int) -> ConvNorm:
    """Return a 3x3 depthwise `ConvNorm`."""
    return ConvNorm(channels, channels, 3, groups=channels)


class Stem(nn.Module):
    """Four 3x3 convolutions, of which the first log2(stride) halve the map.

    Args:
        channels: C.
        width: D of the result; the convolutions widen to it from an eighth of it.
        stride: Pixels of the image on a side of a pixel of the map: 4, 8 or 16.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        widths = [channels, width // 8, width // 4, width // 2, width]
        self.conv = nn.Sequential(
            *(ConvNorm(widths[i], widths[i + 1], 3, 2 if 2 ** (i + 1) <= stride else 1, act=i < 3) for i in range(4))
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H / stride, W / stride), rounded up."""
        return self.conv(images)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the mean over the map (Hu et al. 2018).

    Args:
        channels: D.
        reduced: Channels between the two 1x1 convolutions.
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same shape."""
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Downsample(nn.Module):
    """Halve a map with an inverted bottleneck between two depthwise residuals, which are plain sums without gates.

    Args:
        channels: D of the input.
        out: D of the output.
    """

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
        """(B, channels, H, W) -> (B, out, ceil(H / 2), ceil(W / 2))."""
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)


class FFN(nn.Module):
    """Two 1x1 `ConvNorm`s with a ReLU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = ConvNorm(channels, hidden, act=True), ConvNorm(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> the same shape."""
        return self.fc2(self.fc1(x))


class Block(nn.Module):
    """Depthwise, mixer, depthwise, FFN; each is blended with its input per channel: x <- x + sigmoid(alpha) (f(x) - x).

    Args:
        channels: D.
        mixer: Takes the normalised map; gives the mixed map and its hidden states, if it has any.
        norm: Norm before the mixer.
        mlp_ratio: Hidden channels of the FFN over D.
        gate_init: First value of all alphas.
        drop_path: Probability that an image's branch is dropped in training.
    """

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
        """(B, D, H, W) -> the same shape, and the mixer's hidden states (B, D, N) if it has any."""
        gates = self.alpha.sigmoid()[:, :, None, None].unbind()
        x = x + self.drop_path(gates[0] * (self.dwconv1(x) - x))
        mixed, hidden = self.mixer(self.norm(x))
        x = x + self.drop_path(gates[1] * (mixed - x))
        x = x + self.drop_path(gates[2] * (self.dwconv2(x) - x))
        return x + self.drop_path(gates[3] * (self.ffn(x) - x)), hidden


class Stage(nn.Module):
    """Blocks of one width, and the layer that leads to the next stage."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the blocks on (B, D, H, W).

        Returns:
            The map after the last block, before `downsample`, and that block's hidden states (B, D, N) if it has any.
        """
        hidden = None
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x, hidden = checkpoint(block, x, use_reentrant=False)
            else:
                x, hidden = block(x)
        return x, hidden
