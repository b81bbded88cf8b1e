"""Fused EfficientViM on our compiled layers: the fastest form on a CPU, equal to the model to rounding.

It runs in fp32 eager mode and is not for export. The compiled layers gain three things over a library's. The hidden rows of a
feed-forward never leave the cache. All blocks of a stage are one call. The stem needs 25 multiplications for every 36.
Mixers and norms of the ablations run as they were trained.

Shapes: as in fused.py, but maps are (B, H, W, D).
"""

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from pipeline.models.efficientvim.folding import Conv, Linear
from pipeline.models.efficientvim.fused import (
    FusedBlock,
    FusedDownsample,
    FusedEfficientViM,
    FusedMixer,
    fuse,
)
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.packed import PackedModel
from pipeline.ops.native import stem, vision
from pipeline.ops.native.stages import Downsample, Pool, Stage


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
    if one.stride == 2 and takes[0]:
        together = takes.index(False) if False in takes else len(takes)
        packed: list[nn.Module] = [stem.Stem(of(one), *map(of, (two, *others)[:together]))]
    else:
        together, packed = 1, [OtherStem(one, two)]
    for layer, taken in list(zip(others, takes[1:], strict=True))[together - 1 :]:
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
        return y.permute(0, 2, 3, 1).contiguous(), None if h is None else h.contiguous()


def _ffn(block: FusedBlock) -> vision.FeedForward:
    fc1, fc2 = block.fc1, block.fc2
    assert fc1.bias is not None
    assert fc2.bias is not None
    weights = fc1.weight[..., 0, 0], fc1.bias, fc2.weight[..., 0, 0], fc2.bias
    return vision.FeedForward(_local(block.second), *weights)


class OtherStage(nn.Module):
    """Blocks of which at least one has the mixer of an ablation. All of them run their mixers in torch."""

    def __init__(self, blocks: Iterable[FusedBlock]) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(OtherMixer(block.first, block.mixer) for block in blocks)
        self.ffns = nn.ModuleList(_ffn(block) for block in blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, D) -> the map, and the hidden states (B, N, D) of the last block if there are any."""
        h = None
        for mixer, ffn in zip(self.mixers, self.ffns, strict=True):
            x, h = mixer(x)
            x = ffn(x)
        return x, h


def _stage(blocks: Sequence[FusedBlock]) -> nn.Module:
    if not all(isinstance(block.mixer, FusedMixer) for block in blocks):
        return OtherStage(blocks)
    return Stage([(_mixer(block.first, cast(FusedMixer, block.mixer)), _ffn(block)) for block in blocks])


def _downsample(layer: FusedDownsample) -> Downsample:
    assert layer.widen.bias is not None
    widen = vision.Widen(layer.widen.weight[..., 0, 0], layer.widen.bias, *_local(layer.halve))
    squeeze, excite, narrow = map(_linear, (layer.fc1, layer.fc2, layer.narrow))
    return Downsample(_depthwise(layer.first), widen, squeeze, excite, narrow, _depthwise(layer.last))


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
        self.stem = _stem(cast(Iterable[Conv], model.stem))
        stages = [list(cast(Iterable[FusedBlock], blocks)) for blocks in model.stages]
        self.stages = nn.ModuleList(map(_stage, stages))
        self.downsamples = nn.ModuleList(_downsample(cast(FusedDownsample, d)) for d in model.downsamples)
        # What the heads read: hidden states of every stage, then maps of every stage or of the last one.
        last = [blocks[-1] for blocks in stages]
        scales = [block.unscale for block in last] if model.fusion == "hidden" else []
        scales += [block.owed for block in (last if model.fusion == "map" else last[-1:])]
        pools = (Pool(scale, eps) for scale, eps in zip(scales, model.eps, strict=True))
        self.fusion, self.pools = model.fusion, nn.ModuleList(pools)
        self.head = vision.Linear(model.weight, model.bias)
        self.eval()

    def classify(self, images: Tensor) -> Tensor:
        """As `PackedModel.classify`."""
        x = self.stem(images)
        maps, hidden = [], []
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downsamples[i - 1](x)
            x, h = stage(x)
            if self.fusion == "map" or i == len(self.stages) - 1:
                maps.append(x.flatten(1, 2))
            if self.fusion == "hidden":
                hidden.append(h)
        means = x.new_empty(len(x), self.head.inputs)
        columns = means.split([cast(Pool, pool).width for pool in self.pools], 1)
        for pool, feature, to in zip(self.pools, [*hidden, *maps], columns, strict=True):
            pool(feature, to)
        return self.head(means)
