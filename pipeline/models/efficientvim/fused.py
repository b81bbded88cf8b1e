"""EfficientViM for inference: the same function with fewer and larger steps, equal to rounding.

What is rewritten, and why it is exact:

- Batch norms are affine maps in evaluation; they are folded into the convolution before them.
- A gated depthwise branch (1 - g) x + g (k * x) is one depthwise convolution with the kernel (1 - g) delta + g k.
- A gated branch (1 - g) x + g f(x) before a depthwise convolution need not scale x. It becomes x + g / (1 - g) f(x), a sum
  in place, and the factor 1 - g is folded into that convolution's kernel.
- The importance's offset `A` is dropped, since a softmax over the tokens cancels it; h SiLU(z) + D h = h (SiLU(z) + D).
- All heads (both sets), their fusion weights and the affine part of their norms are one linear map.

Maps are channels-last, so that 1x1 convolutions, layer norms and the mixer's products read one layout and nothing is copied.
H and W stay apart and no size is read from a tensor, so the graph exports with static shapes.

Shapes: B images, C image channels, D channels, H x W pixels of a map, L = H W tokens, N hidden states, K classes.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.efficientvim.blocks import Block, ConvNorm, Downsample, SqueezeExcite, Stage
from pipeline.models.efficientvim.folding import Conv, Linear, conv, depthwise, folded
from pipeline.models.efficientvim.mixers import ChannelNorm
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.layers import HSMSSD


def fuse(model: EfficientViM) -> "FusedEfficientViM":
    """Rewrite a trained model for inference.

    Args:
        model: Its batch norms must have been trained. It is not changed.

    Returns:
        A model without parameters, in eval mode, that gives the same logits to rounding.

    Raises:
        ConfigError: The model has no classifier.
    """
    return FusedEfficientViM(model)


class FusedMixer(nn.Module):
    """HSM-SSD with the norm before it and the sum after it.

    Args:
        mixer: The trained mixer.
        norm: The norm before it.
        scale: Factors (D,) of the branch in the sum.
    """

    gamma: Tensor
    beta: Tensor
    skip: Tensor

    def __init__(self, mixer: HSMSSD, norm: ChannelNorm, scale: Tensor) -> None:
        super().__init__()
        self.rows, self.eps, self.channels = mixer.rows, norm.eps, norm.normalized_shape
        self.register_buffer("gamma", norm.weight.detach().clone())
        self.register_buffer("beta", norm.bias.detach().clone())
        project, spread = mixer.BCdt_proj.conv.weight.detach()[..., 0], mixer.dw.conv.weight.detach()
        self.project, self.spread = Linear(project), Conv(spread, groups=len(spread))
        h, z = mixer.hz_proj.conv.weight.detach()[..., 0].chunk(2)
        out = mixer.out_proj.conv.weight.detach()[..., 0].double() * scale[:, None]
        self.to_h, self.to_gate, self.to_out = Linear(h), Linear(z, act="silu"), Linear(out.float())
        self.register_buffer("skip", mixer.D.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a channels-last map (B, D, H, W).

        Returns:
            x + scale mixer(norm(x)), and the hidden states (B, N, D) times `scale`.
        """
        channels, height, width = map(int, x.shape[1:])  # constants of an exported graph
        last = x.permute(0, 2, 3, 1)
        tokens = F.layer_norm(last, self.channels, self.gamma, self.beta, self.eps)
        rows = self.spread(self.project(tokens).permute(0, 3, 1, 2))
        b, c, dt = rows.reshape(-1, sum(self.rows), height * width).split(self.rows, 1)  # (B, N, L) each
        states = (dt.softmax(-1) * b) @ tokens.reshape(-1, height * width, channels)  # (B, N, D)
        h = self.to_out(self.to_h(states) * (self.to_gate(states) + self.skip))
        mixed = torch.baddbmm(last.reshape(-1, height * width, channels), c.transpose(1, 2), h)
        return mixed.view(-1, height, width, channels).permute(0, 3, 1, 2), h


class PlainMixer(nn.Module):
    """Any other mixer or norm, as it was trained, and the sum after it; `scale` as in `FusedMixer`."""

    scale: Tensor

    def __init__(self, block: Block, scale: Tensor) -> None:
        super().__init__()
        self.mixer, self.norm = block.mixer, block.norm
        self.register_buffer("scale", scale.float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W) -> the sum, and the hidden states (B, N, D) times `scale` if there are any."""
        y, h = self.mixer(self.norm(x))
        states = None if h is None else (h * self.scale[:, None]).transpose(1, 2)
        return x + y * self.scale[:, None, None], states


class FusedBlock(nn.Module):
    """A block whose last gate is left to the layer that reads its map.

    Args:
        block: The trained block.
        inputs: Factors (D,) that the incoming map must still be multiplied by; None for none.

    Attributes:
        owed: Factors (D,) that the map which this block leaves must still be multiplied by.
        unscale: Factors (D,) that turn the hidden states into the model's.
    """

    owed: Tensor
    unscale: Tensor

    def __init__(self, block: Block, inputs: Tensor | None) -> None:
        super().__init__()
        gates = block.alpha.detach().double().sigmoid()
        rest = (-block.alpha.detach().double()).sigmoid()  # 1 - gate, without cancellation
        self.first = depthwise(block.dwconv1, gates[0], inputs)
        ratio, mixer, norm = gates[1] / rest[1], block.mixer, block.norm
        if isinstance(mixer, HSMSSD) and isinstance(norm, ChannelNorm) and mixer.rows[-1] in (1, mixer.rows[0]):
            self.mixer: nn.Module = FusedMixer(mixer, norm, ratio)
        else:
            self.mixer = PlainMixer(block, ratio)
        self.register_buffer("unscale", (1 / ratio).float())
        self.second = depthwise(block.dwconv2, gates[2], rest[1])
        self.fc1, self.fc2 = conv(block.ffn.fc1), conv(block.ffn.fc2, gates[3] / rest[3])
        self.register_buffer("owed", rest[3].float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W) -> the map before its `owed`, and the hidden states (B, N, D) if there are any."""
        x, h = self.mixer(self.first(x))
        x = self.second(x)
        return self.fc2(self.fc1(x), x), h

    def read_map(self, x: Tensor) -> Tensor:
        """Turn the map that this block leaves into the model's: (B, D, H, W) -> (B, L, D)."""
        return (x * self.owed[:, None, None]).flatten(2).transpose(1, 2)

    def read_hidden(self, h: Tensor) -> Tensor:
        """Turn the hidden states (B, N, D) that this block leaves into the model's."""
        return h * self.unscale


class FusedDownsample(nn.Module):
    """A downsampler whose input must still be multiplied by `inputs` (D,)."""

    def __init__(self, layer: Downsample, inputs: Tensor) -> None:
        super().__init__()
        self.first = depthwise(layer.dwconv1, None, inputs)
        widen, halve, excite, narrow = layer.conv
        assert isinstance(widen, ConvNorm)
        assert isinstance(halve, ConvNorm)
        assert isinstance(narrow, ConvNorm)
        assert isinstance(excite, SqueezeExcite)
        self.widen, self.halve = conv(widen), conv(halve)
        weight, bias = folded(narrow)
        self.narrow = Linear(weight[..., 0, 0].float(), bias.float())
        self.fc1, self.fc2 = (
            Linear(fc.weight.detach()[..., 0, 0], cast(Tensor, fc.bias).detach(), act)
            for fc, act in ((excite.fc1, "relu"), (excite.fc2, "sigmoid"))
        )
        self.last = depthwise(layer.dwconv2, None, None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, out, ceil(H / 2), ceil(W / 2))."""
        x = self.halve(self.widen(self.first(x))).permute(0, 2, 3, 1)
        x = x * self.fc2(self.fc1(x.mean((1, 2))))[:, None, None]
        return self.last(self.narrow(x).permute(0, 3, 1, 2))


class FusedEfficientViM(nn.Module):
    """EfficientViM with folded operations, made by `fuse`; it has buffers and no parameters."""

    weight: Tensor
    bias: Tensor

    def __init__(self, model: EfficientViM) -> None:
        super().__init__()
        self.image_size, self.num_classes, self.fusion = model.image_size, model.num_classes, model.fusion
        self.stem = nn.Sequential(*(conv(layer) for layer in cast(Iterable[ConvNorm], model.patch_embed.conv)))
        self.stages, self.downsamples = nn.ModuleList(), nn.ModuleList()
        owed: Tensor | None = None
        for stage in model.stages:
            assert isinstance(stage, Stage)
            blocks: list[FusedBlock] = []
            for block in stage.blocks:
                assert isinstance(block, Block)
                blocks.append(FusedBlock(block, owed))
                owed = blocks[-1].owed.double()
            self.stages.append(nn.ModuleList(blocks))
            if stage.downsample is not None:
                assert owed is not None
                self.downsamples.append(FusedDownsample(stage.downsample, owed))
                owed = None
        self.eps = [norm.eps if isinstance(norm, ChannelNorm) else None for norm in model.norm]
        self.widths = model.feature_widths
        weight, bias = head(model)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        maps, hidden = [], []
        for i, blocks in enumerate(cast(Iterable[nn.ModuleList], self.stages)):
            if i:
                x = self.downsamples[i - 1](x)
            for block in blocks:
                x, h = block(x)
            last = cast(FusedBlock, blocks[-1])
            if self.fusion == "map" or i == len(self.stages) - 1:
                maps.append(last.read_map(x))
            if self.fusion == "hidden":
                hidden.append(last.read_hidden(h))
        return F.linear(pooled([*hidden, *maps], self.eps, self.widths), self.weight, self.bias)


def pooled(features: list[Tensor], eps: list[float | None], widths: Sequence[int]) -> Tensor:
    """Pool what the heads read.

    Args:
        features: One (B, L or N, D) for each head.
        eps: Epsilon of the layer norm of each, without its affine part; None for no norm.
        widths: D of each.

    Returns:
        The means over tokens or states, concatenated: (B, sum of D).
    """
    means = [
        (x if e is None else F.layer_norm(x, (width,), None, None, e)).mean(1)
        for x, e, width in zip(features, eps, widths, strict=True)
    ]
    return torch.cat(means, 1)


def head(model: EfficientViM) -> tuple[Tensor, Tensor]:
    """Fold all heads and the affine part of their norms into one linear map of the pooled features.

    Returns:
        Weight (K, sum of D) and bias (K,).

    Raises:
        ConfigError: The model has no classifier.
    """
    if not model.num_classes:
        raise ConfigError("this model has no classifier to fuse; build it with num_classes above 0")
    suffixes = ("", "_dist") if model.distilled else ("",)
    weights, biases = [], []
    for i, norm in enumerate(cast(Iterable[ChannelNorm | nn.BatchNorm1d], model.norm)):
        scale, shift = norm.weight.detach().double(), norm.bias.detach().double()
        if isinstance(norm, nn.BatchNorm1d):
            assert norm.running_var is not None
            assert norm.running_mean is not None
            scale = scale / (norm.running_var.double() + norm.eps).sqrt()
            shift = shift - norm.running_mean.double() * scale
        for suffix in suffixes:
            linear = model.get_submodule(f"heads{suffix}.{i}")
            assert isinstance(linear, nn.Linear)
            share = torch.tensor(1.0 / len(suffixes), dtype=torch.float64)
            if len(model.feature_widths) > 1:
                share = share * model.get_parameter(f"weights{suffix}").detach().double().softmax(0)[i]
            weight = linear.weight.detach().double()
            weights.append((i, share * weight * scale))
            biases.append(share * (linear.bias.detach().double() + weight @ shift))
    columns = [sum(w for j, w in weights if j == i) for i in range(len(model.feature_widths))]
    return torch.cat(cast(list[Tensor], columns), 1).float(), torch.stack(biases).sum(0).float()
