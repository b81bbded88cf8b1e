"""Fused EfficientViM on our compiled layers: the fastest form on a CPU, equal to the model to rounding.

It runs in fp32 eager mode and is not for export. The compiled layers gain three things over a library's. The hidden rows of a
feed-forward never leave the cache. The mixer is one call. The stem needs 25 multiplications for every 36.
Mixers and norms of the ablations run as they were trained.

Shapes: as in fused.py, but maps are (B, H, W, D).
"""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from pipeline.models.efficientvim.folding import Conv, Linear
from pipeline.models.efficientvim.fused import (
    FusedBlock,
    FusedDownsample,
    FusedEfficientViM,
    FusedMixer,
    fuse,
    pooled,
)
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.packed import PackedModel
from pipeline.ops.native import stem, vision


def pack(model: EfficientViM | FusedEfficientViM) -> "PackedEfficientViM":
    """Put a trained model on our compiled layers.

    Args:
        model: The fused model, or a plain one, which is fused first. It is not changed.

    Returns:
        A model for fp32 on the CPU. It cannot be pickled: keep the model, and pack it again.

    Raises:
        EnvironmentProblem: There is no C++ compiler.
        ConfigError: The model has no classifier.
    """
    return PackedEfficientViM(fuse(model) if isinstance(model, EfficientViM) else model)


def _depthwise(layer: Conv) -> vision.Depthwise:
    return vision.Depthwise(_local(layer))


def _local(layer: Conv) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight, layer.bias


def _linear(layer: Linear) -> vision.Linear:
    return vision.Linear(layer.weight, layer.bias, layer.act)


class OtherConv(nn.Module):
    """A convolution that no compiled layer takes, because of its channels or its stride of 1."""

    def __init__(self, layer: Conv) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, in) -> (B, H', W', out)."""
        return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class OtherStem(nn.Module):
    """The first convolutions of a stem that no compiled layer takes."""

    def __init__(self, *layers: Conv) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', D)."""
        return self.layers(images).permute(0, 2, 3, 1).contiguous()


def _stem(layers: Iterable[Conv]) -> nn.Sequential:
    def of(layer: Conv) -> tuple[Tensor, Tensor | None, str]:
        return layer.weight, layer.bias, "relu" if layer.act else "none"

    one, two, *others = layers
    # With a stem_stride of 4 or 8 the last convolutions have stride 1.
    takes = [layer.stride == 2 and stem.MapConv.takes(layer.weight.shape[1]) for layer in (two, *others)]
    packed: list[nn.Module] = [stem.Stem(of(one), of(two)) if takes[0] and one.stride == 2 else OtherStem(one, two)]
    for layer, taken in zip(others, takes[1:], strict=True):
        packed.append(stem.MapConv(*of(layer)) if taken else OtherConv(layer))
    return nn.Sequential(*packed)


def _mixer(first: Conv, mixer: FusedMixer) -> vision.Mixer:
    return vision.Mixer(
        _local(first),
        rows=mixer.rows,
        eps=mixer.eps,
        gamma=mixer.gamma,
        beta=mixer.beta,
        project=mixer.project.weight,
        spread=mixer.spread.weight,
        to_h=mixer.to_h.weight,
        to_gate=mixer.to_gate.weight,
        skip=mixer.skip,
        to_out=mixer.to_out.weight,
    )


class OtherMixer(nn.Module):
    """The mixer of an ablation, and the convolution before it."""

    def __init__(self, first: Conv, mixer: nn.Module) -> None:
        super().__init__()
        self.first, self.mixer = _depthwise(first), mixer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) -> the same shape, and the hidden states (B, N, D) if there are any."""
        y, h = self.mixer(self.first(x).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1).contiguous(), h


class PackedBlock(nn.Module):
    """A fused block on compiled layers; `owed` and `unscale` are those of `FusedBlock`."""

    owed: Tensor
    unscale: Tensor

    def __init__(self, block: FusedBlock) -> None:
        super().__init__()
        self.register_buffer("owed", block.owed)
        self.register_buffer("unscale", block.unscale)
        mixer = block.mixer
        self.mixer = _mixer(block.first, mixer) if isinstance(mixer, FusedMixer) else OtherMixer(block.first, mixer)
        fc1, fc2 = block.fc1, block.fc2
        assert fc1.bias is not None
        assert fc2.bias is not None
        weights = fc1.weight[..., 0, 0], fc1.bias, fc2.weight[..., 0, 0], fc2.bias
        self.ffn = vision.FeedForward(_local(block.second), *weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) -> the map before its `owed`, and the hidden states (B, N, D) if there are any."""
        x, h = self.mixer(x)
        return self.ffn(x), h

    def read_map(self, x: Tensor) -> Tensor:
        """Turn the map that this block leaves into the model's: (B, H, W, D) -> (B, L, D)."""
        return (x * self.owed).flatten(1, 2)

    def read_hidden(self, h: Tensor) -> Tensor:
        """Turn the hidden states (B, N, D) that this block leaves into the model's."""
        return h * self.unscale


class PackedDownsample(nn.Module):
    """A fused downsampler on compiled layers."""

    def __init__(self, layer: FusedDownsample) -> None:
        super().__init__()
        self.first, self.last = _depthwise(layer.first), _depthwise(layer.last)
        assert layer.widen.bias is not None
        self.widen = vision.Widen(layer.widen.weight[..., 0, 0], layer.widen.bias, *_local(layer.halve))
        self.narrow, self.fc1, self.fc2 = map(_linear, (layer.narrow, layer.fc1, layer.fc2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, ceil(H / 2), ceil(W / 2), out)."""
        x = self.widen(self.first(x))
        x *= self.fc2(self.fc1(x.mean((1, 2))))[:, None, None]
        return self.last(self.narrow(x))


class PackedEfficientViM(PackedModel):
    """EfficientViM on compiled layers, made by `pack`."""

    def __init__(self, model: FusedEfficientViM) -> None:
        super().__init__(
            in_chans=int(cast(Conv, model.stem[0]).weight.shape[1]),
            num_classes=model.num_classes,
            image_size=model.image_size,
            any_size=True,
            instead="fuse()",
        )
        self.fusion, self.eps, self.widths = model.fusion, model.eps, model.widths
        self.stem = _stem(cast(Iterable[Conv], model.stem))
        self.stages = nn.ModuleList()
        for blocks in model.stages:
            self.stages.append(nn.Sequential(*(PackedBlock(block) for block in cast(Iterable[FusedBlock], blocks))))
        self.downsamples = nn.ModuleList(PackedDownsample(cast(FusedDownsample, d)) for d in model.downsamples)
        self.head = vision.Linear(model.weight, model.bias)
        self.eval()

    def classify(self, images: Tensor) -> Tensor:
        """As `PackedModel.classify`."""
        x = self.stem(images)
        maps, hidden = [], []
        for i, blocks in enumerate(self.stages):
            if i:
                x = self.downsamples[i - 1](x)
            for block in cast(nn.Sequential, blocks):
                x, h = block(x)
            last = cast(PackedBlock, cast(nn.Sequential, blocks)[-1])
            if self.fusion == "map" or i == len(self.stages) - 1:
                maps.append(last.read_map(x))
            if self.fusion == "hidden":
                hidden.append(last.read_hidden(h))
        return self.head(pooled([*hidden, *maps], self.eps, self.widths))
