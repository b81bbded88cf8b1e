"""The compiled library of the layers for inference, called through ctypes, and the layout that it wants of weights.

The structures mirror those of vision.h, stages.cpp, stem.cpp and mamba.cpp field by field. All tensors are contiguous fp32 on
the CPU, except the indices of tokens.
"""

from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.native.build import FOLDER, load_library

PAD = 32  # layers.h: pad
SOURCES = tuple(FOLDER / name for name in ("vision.cpp", "mixer.cpp", "stages.cpp", "stem.cpp", "mamba.cpp"))


def _fields(integers: str, pointers: str) -> list[tuple[str, type]]:
    return [(name, c_int64) for name in integers.split()] + [(name, c_void_p) for name in pointers.split()]


class LocalCall(Structure):
    """vision.h: Local, a map and the depthwise convolution over it."""

    _fields_ = _fields("height width channels", "x weight bias")


class LinearCall(Structure):
    """vision.h: LinearCall."""

    _fields_ = _fields("rows inputs outputs act", "x weight bias y")


class FfnCall(Structure):
    """vision.h: FfnCall."""

    _fields_ = [("local", LocalCall), *_fields("batch hidden", "up up_bias down down_bias y")]


class DepthwiseCall(Structure):
    """vision.h: DepthwiseCall."""

    _fields_ = [("local", LocalCall), *_fields("batch", "y")]


class ConvCall(Structure):
    """stem.cpp: ConvCall, a 3x3 convolution with stride 2."""

    _fields_ = _fields("batch height width inputs outputs act", "x weight bias y")


class StemCall(Structure):
    """stem.cpp: StemCall, convolutions one after another."""

    _fields_ = [("one", ConvCall), ("two", ConvCall), *_fields("count", "others")]


class WidenCall(Structure):
    """vision.h: WidenCall."""

    _fields_ = _fields("batch height width inputs outputs", "x weight bias taps taps_bias y")


class MixerCall(Structure):
    """vision.h: MixerCall."""

    _fields_ = [
        ("local", LocalCall),
        *_fields("batch states inner", ""),
        ("eps", c_double),
        *_fields("", "gamma beta project spread to_h to_gate skip to_out y tokens rows read gathered h"),
    ]


class StageBlock(Structure):
    """stages.cpp: Block, the layers of a block of EfficientViM."""

    _fields_ = [("mixer", MixerCall), ("ffn", FfnCall)]


class _StageCall(Structure):
    _fields_ = _fields("batch height width count", "blocks x y hidden")


class DownsampleLayers(Structure):
    """stages.cpp: Downsample, the layers of a downsampler of EfficientViM."""

    _fields_ = [
        ("first", DepthwiseCall),
        ("widen", WidenCall),
        ("squeeze", LinearCall),
        ("excite", LinearCall),
        ("narrow", LinearCall),
        ("last", DepthwiseCall),
    ]


class _DownsampleCall(Structure):
    _fields_ = _fields("batch height width", "layers x y first wide means squeezed factors narrow")


class _PoolCall(Structure):
    _fields_ = [
        *_fields("batch rows width image row out_image normed", ""),
        ("eps", c_double),
        *_fields("", "x scale y"),
    ]


class DirectionCall(Structure):
    """mamba.cpp: Direction, the weights of one direction of a mixer."""

    _fields_ = _fields("", "tokens taps taps_bias project spread spread_bias rates skip")


class BlockCall(Structure):
    """mamba.cpp: Block, the weights of a block of Vision Mamba."""

    _fields_ = [
        *_fields("inner states rank taps directions centred hidden hidden_centred", ""),
        ("eps", c_double),
        ("hidden_eps", c_double),
        *_fields("", "project project_bias join both both_bias down down_bias"),
        ("direction", DirectionCall * 4),
    ]


class _BlocksCall(Structure):
    _fields_ = _fields("batch steps width count", "blocks x xz y v delta low")


_ENTRIES = {
    "vision_linear": LinearCall,
    "vision_ffn": FfnCall,
    "vision_depthwise": DepthwiseCall,
    "vision_widen": WidenCall,
    "vision_stem": StemCall,
    "vision_conv_map": ConvCall,
    "vision_mixer": MixerCall,
    "vision_stage": _StageCall,
    "vision_downsample": _DownsampleCall,
    "vision_pool": _PoolCall,
    "mamba_blocks": _BlocksCall,
}


class VisionLibrary:
    """The loaded library with its argument types declared.

    Args:
        simd: The instruction set, a key of `build.SIMD`; by default the widest that this processor runs.

    Raises:
        BuildError: If there is no compiler, or it fails.
    """

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
        """Call an entry of the library.

        Args:
            name: The entry, a key of `_ENTRIES`.
            fields: Integers, tensors (or None) and structures in the order of the entry's structure.

        Raises:
            MemoryError: If a thread cannot get its scratch memory.
        """
        call = _ENTRIES[name](*(pointer(field) if isinstance(field, Tensor) else field for field in fields))
        if getattr(self._lib, name)(byref(call)):
            raise MemoryError(f"{name}: not enough memory for a thread's scratch")

    def panels(self, weight: Tensor, inputs: int | None = None) -> Tensor:
        """Lay a weight out for the products: (out, in) -> (panels, inputs, panel), zero beyond `out` and `in`.

        Args:
            weight: (out, in).
            inputs: Rows of a panel; by default `in` rounded up to a multiple of `PAD`.
        """
        inputs = padded(weight.shape[1]) if inputs is None else inputs
        weight = F.pad(weight, (0, inputs - weight.shape[1], 0, -len(weight) % max(PAD, self.panel)))
        return weight.view(-1, self.panel, inputs).transpose(1, 2).contiguous().float()

    def row(self, values: Tensor | None, width: int) -> Tensor:
        """Return `values`, or zeros, for `width` columns, padded with zeros to whole panels."""
        row = torch.zeros(width) if values is None else values
        return F.pad(row.float(), (0, -width % max(PAD, self.panel))).contiguous()


@cache
def vision_library() -> VisionLibrary:
    """Return the library of this machine; the first call builds it."""
    return VisionLibrary()


def pointer(tensor: Tensor) -> int:
    """Return the address of a tensor's data; ValueError unless it is fp32 on the CPU."""
    if tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise ValueError(
            f"compiled layers take fp32 on the CPU, not {tensor.dtype} on {tensor.device}; pack the model anew"
        )
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def padded(width: int) -> int:
    """Return `width` rounded up to a multiple of `PAD`."""
    return width + -width % PAD


def halved(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (B, H/2, W/2), rounded up, for (B, H, W)."""
    batch, height, width = size
    return batch, (height + 1) // 2, (width + 1) // 2
