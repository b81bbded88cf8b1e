"""EfficientViM's compiled layers for inference (vision.cpp, stem.cpp) on tensors, with weights laid out for them.

fp32 on the CPU, without autograd; maps are contiguous (B, H, W, C), rows (..., C). Each layer is a module that holds its packed
weights as buffers. Raises BuildError where there is no compiler.
"""

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.ops.native.build import FOLDER, load_library

ACTIVATIONS = ("none", "relu", "silu", "sigmoid")  # layers.h: Act
PAD = 32  # layers.h: pad
STATES = 16  # the mixer's states are padded to a multiple of it
SOURCES = (FOLDER / "vision.cpp", FOLDER / "stem.cpp")


def _fields(integers: str, pointers: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in integers.split()] + [(name, c_void_p) for name in pointers.split()]


class _Local(Structure):
    _fields_ = _fields("height width channels", "x weight bias")


class _LinearCall(Structure):
    _fields_ = _fields("rows inputs outputs act", "x weight bias y")


class _FfnCall(Structure):
    _fields_ = [("local", _Local), *_fields("batch hidden", "up up_bias down down_bias y")]


class _DepthwiseCall(Structure):
    _fields_ = [("local", _Local), *_fields("batch", "y")]


class _ConvCall(Structure):
    _fields_ = _fields("batch height width inputs outputs act", "x weight bias y")


class _StemCall(Structure):
    _fields_ = [("one", _ConvCall), ("two", _ConvCall)]


class _WidenCall(Structure):
    _fields_ = _fields("batch height width inputs outputs", "x weight bias taps taps_bias y")


class _MixerCall(Structure):
    _fields_ = [
        ("local", _Local),
        *_fields("batch states inner", ""),
        ("eps", c_double),
        *_fields("", "gamma beta project spread to_h to_gate skip to_out y tokens rows read gathered h"),
    ]


_ENTRIES = {
    "vision_linear": _LinearCall,
    "vision_ffn": _FfnCall,
    "vision_depthwise": _DepthwiseCall,
    "vision_widen": _WidenCall,
    "vision_stem": _StemCall,
    "vision_conv_map": _ConvCall,
    "vision_mixer": _MixerCall,
}


class VisionLibrary:
    """The loaded library with its argument types declared; `simd` as in build.SIMD, by default the best."""

    def __init__(self, simd: str | None = None) -> None:
        self._lib = load_library(simd, sources=SOURCES)
        self._lib.vision_panel.restype = c_int64
        for name, call in _ENTRIES.items():
            getattr(self._lib, name).argtypes = [POINTER(call)]
            getattr(self._lib, name).restype = c_int64
        self.panel = int(self._lib.vision_panel())

    def __deepcopy__(self, memo: object) -> "VisionLibrary":
        return self  # a library is loaded once

    def run(self, name: str, *fields: object) -> None:
        """Call an entry: integers, tensors (or None) and structures in the order of its fields."""
        call = _ENTRIES[name](*(_pointer(field) if isinstance(field, Tensor) else field for field in fields))
        if getattr(self._lib, name)(byref(call)):
            raise MemoryError(f"{name}: not enough memory for a thread's scratch")

    def panels(self, weight: Tensor, inputs: int | None = None) -> Tensor:
        """(out, in) -> (panels, inputs, panel), zero beyond `out` and `in`; `inputs`: `in` padded to PAD by default."""
        inputs = _padded(weight.shape[1]) if inputs is None else inputs
        weight = F.pad(weight, (0, inputs - weight.shape[1], 0, -len(weight) % max(PAD, self.panel)))
        return weight.view(-1, self.panel, inputs).transpose(1, 2).contiguous().float()

    def row(self, values: Tensor | None, width: int) -> Tensor:
        """`values` (or zeros) for `width` columns, zero up to whole panels."""
        row = torch.zeros(width) if values is None else values
        return F.pad(row.float(), (0, -width % max(PAD, self.panel))).contiguous()


@cache
def vision_library() -> VisionLibrary:
    """This machine's, built at the first call."""
    return VisionLibrary()


def _pointer(tensor: Tensor) -> int:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"compiled layers take fp32 on the CPU, not {tensor.dtype} on {tensor.device}; pack the model anew"
        )
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _padded(width: int) -> int:
    return width + -width % PAD


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C)."""
    return weight.flatten(1).t().contiguous().float()


class Layer(nn.Module):
    def __init__(self, library: VisionLibrary | None) -> None:
        super().__init__()
        self.library = library or vision_library()


class Linear(Layer):
    """act(x W' + b): (..., in) -> (..., out); weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, act: str = "none", library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape
        self.register_buffer("weight", self.library.panels(weight))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.act = ACTIVATIONS.index(act)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.inputs
        y = x.new_empty(*x.shape[:-1], self.outputs)
        sizes = x.numel() // self.inputs, self.inputs, self.outputs, self.act
        self.library.run("vision_linear", *sizes, x, self.weight, self.bias, y)
        return y


class Local(Layer):
    """Base of what begins with a 3x3 depthwise convolution of its map: weight (C, 1, 3, 3), bias (C,)."""

    taps: Tensor
    taps_bias: Tensor

    def __init__(self, local: tuple[Tensor, Tensor], library: VisionLibrary | None = None) -> None:
        super().__init__(library)
        weight, bias = local
        self.channels = len(weight)
        self.register_buffer("taps", _taps(weight))
        self.register_buffer("taps_bias", bias.contiguous().float())

    def call(self, x: Tensor) -> _Local:
        _, height, width, channels = x.shape
        assert channels == self.channels
        return _Local(height, width, channels, _pointer(x), _pointer(self.taps), _pointer(self.taps_bias))


class FeedForward(Local):
    """With t = DWConv(x): t + W2 relu(W1 t + b1) + b2, a map (B, H, W, C) -> the same; up (hidden, C), down (C, hidden)."""

    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(
        self,
        local: tuple[Tensor, Tensor],
        up: Tensor,
        up_bias: Tensor,
        down: Tensor,
        down_bias: Tensor,
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(local, library)
        self.hidden = len(up)
        self.register_buffer("up", self.library.panels(up))
        self.register_buffer("up_bias", self.library.row(up_bias, self.hidden))
        self.register_buffer("down", self.library.panels(down))
        self.register_buffer("down_bias", self.library.row(down_bias, self.channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        weights = self.up, self.up_bias, self.down, self.down_bias
        self.library.run("vision_ffn", self.call(x), len(x), self.hidden, *weights, y)
        return y


class Widen(Layer):
    """relu(DWConv(relu(x W' + b))), the convolution 3x3 with stride 2: a map (B, H, W, in) -> (B, H/2, W/2, out), rounded up.

    weight (out, in), bias (out,), taps (out, 1, 3, 3), taps_bias (out,).
    """

    weight: Tensor
    bias: Tensor
    taps: Tensor
    taps_bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, taps: Tensor, taps_bias: Tensor, library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape
        self.register_buffer("weight", self.library.panels(weight))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.register_buffer("taps", _taps(taps))
        self.register_buffer("taps_bias", taps_bias.contiguous().float())

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, inputs = x.shape
        assert inputs == self.inputs
        y = x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, self.outputs)
        weights = self.weight, self.bias, self.taps, self.taps_bias
        self.library.run("vision_widen", batch, height, width, inputs, self.outputs, x, *weights, y)
        return y


class Depthwise(Local):
    """That convolution by itself: a map (B, H, W, C) -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        self.library.run("vision_depthwise", self.call(x), len(x), y)
        return y


class MapConv(Layer):
    """3x3 convolution of a map with stride 2, padded with zeros, in 25 multiplications instead of 36.

    Shapes: (B, H, W, in) -> (B, H/2, W/2, out), rounded up; weight (out, in, 3, 3). `in` is a multiple of 16 or 28.
    Source: Winograd's minimal filtering F(2, 2), here on the even rows and columns; stem.cpp has the algebra.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, act: str = "none", library: VisionLibrary | None = None
    ) -> None:
        super().__init__(library)
        self.outputs, self.inputs = weight.shape[:2]
        assert self.takes(self.inputs)
        assert act in ("none", "relu")
        w = weight.double()
        lines = [[w[..., 0, :], w[..., 1, :]], [w[..., 2, :], w[..., 1, :]], [w[..., 0, :] + w[..., 2, :]]]
        parts = []
        for pair in lines:
            columns = [[[g[..., 0], g[..., 1]], [g[..., 2], g[..., 1]], [g[..., 0] + g[..., 2]]] for g in pair]
            parts += [part for q in range(3) for column in columns for part in column[q]]
        self.register_buffer("weight", self.library.panels(torch.cat(parts, 1), 25 * self.inputs))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.act = ACTIVATIONS.index(act)

    @staticmethod
    def takes(channels: int) -> bool:
        return channels % 16 == 0 or channels % 28 == 0

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, inputs = x.shape
        assert inputs == self.inputs
        y = x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, self.outputs)
        sizes = batch, height, width, self.inputs, self.outputs, self.act
        self.library.run("vision_conv_map", *sizes, x, self.weight, self.bias, y)
        return y


class Stem(nn.Module):
    """Two 3x3 convolutions with stride 2, padded with zeros: images (B, in, H, W) -> a map (B, H/4, W/4, out), rounded up.

    Each is a weight (out, in, 3, 3), a bias (out,) and an activation (none, relu); what is between them as MapConv takes it.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        one: tuple[Tensor, Tensor | None, str],
        two: tuple[Tensor, Tensor | None, str],
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__()
        self.second = MapConv(*two, library)
        self.library = self.second.library
        weight, bias, act = one
        assert act in ("none", "relu")
        self.outputs, self.inputs = weight.shape[:2]
        taps = weight.permute(0, 2, 3, 1).flatten(1)
        self.register_buffer("weight", self.library.panels(taps, taps.shape[1]))
        self.register_buffer("bias", self.library.row(bias, self.outputs))
        self.act = ACTIVATIONS.index(act)

    def forward(self, images: Tensor) -> Tensor:
        images, second = images.contiguous(), self.second
        batch, inputs, height, width = images.shape
        assert inputs == self.inputs
        pointers = _pointer(images), _pointer(self.weight), _pointer(self.bias), None
        one = _ConvCall(batch, height, width, self.inputs, self.outputs, self.act, *pointers)
        height, width = (height + 1) // 2, (width + 1) // 2
        y = images.new_empty(batch, (height + 1) // 2, (width + 1) // 2, second.outputs)
        ends = _pointer(second.weight), _pointer(second.bias), _pointer(y)
        two = _ConvCall(batch, height, width, self.outputs, second.outputs, second.act, None, *ends)
        self.library.run("vision_stem", one, two)
        return y


class Mixer(Local):
    """HSM-SSD with what surrounds it: a map (B, H, W, D) -> (the map, hidden states (B, N, D)).

    x' = DWConv(x); t = LN(x'); (b, c, d) = DWConv(t P); s = (softmax(d) b) t; h = ((s Wh) (SiLU(s Wz) + skip)) Wo; x' + c' h.
    gamma, beta (D,); skip (E,) or (1,); project (2 N + N or 1, D); spread (the same, 1, 3, 3); to_h, to_gate (E, D);
    to_out (D, E).
    """

    def __init__(
        self,
        local: tuple[Tensor, Tensor],
        *,
        rows: Sequence[int],
        eps: float,
        gamma: Tensor,
        beta: Tensor,
        project: Tensor,
        spread: Tensor,
        to_h: Tensor,
        to_gate: Tensor,
        skip: Tensor,
        to_out: Tensor,
        library: VisionLibrary | None = None,
    ) -> None:
        super().__init__(local, library)
        self.states, self.inner, self.eps = rows[0], len(to_h), eps
        self.padded_states = self.states + -self.states % STATES

        # b, c and d with padded states; an importance of one row serves them all.
        def groups(rows_of: Tensor) -> Tensor:
            b, c, d = rows_of.split(list(rows))
            d = d.expand(self.states, *d.shape[1:])
            pad = (0, 0) * (rows_of.dim() - 1) + (0, self.padded_states - self.states)
            return torch.cat([F.pad(part, pad) for part in (b, c, d)])

        buffers = {
            "gamma": self.library.row(gamma, self.channels),
            "beta": self.library.row(beta, self.channels),
            "project": self.library.panels(groups(project)),
            "spread": _taps(groups(spread)),
            "to_h": self.library.panels(to_h),
            "to_gate": self.library.panels(to_gate),
            "skip": self.library.row(skip.expand(self.inner), self.inner),
            "to_out": self.library.panels(to_out),
        }
        self.names = list(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, height, width, channels = x.shape
        padded, states = _padded(channels), self.padded_states
        y, h = torch.empty_like(x), x.new_empty(batch, states, padded)
        tokens = x.new_empty(batch, height * width, padded)
        scratch = (
            tokens,
            x.new_empty(batch, height * width, 3 * states),
            x.new_empty(batch, height * width, states),
            x.new_empty(batch, states, padded),
        )
        weights = [self._buffers[name] for name in self.names]
        self.library.run("vision_mixer", self.call(x), batch, states, self.inner, self.eps, *weights, y, *scratch, h)
        return y, h[:, : self.states, :channels]
