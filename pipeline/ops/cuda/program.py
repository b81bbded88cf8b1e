"""What is compiled: a kernel's source file, the values of its macros, and the structures that it takes.

The structures mirror those of `scan.cuh` and `conv.cu` field by field.
"""

from ctypes import Structure, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

FOLDER = Path(__file__).parent
THREADS = 256  # every kernel has blocks of this size
HEADERS = ("common.cuh", "scan.cuh", "emulator.h")


@dataclass(frozen=True, kw_only=True)
class Program:
    """One compilation of a source file. The fields are its macros; `common.cuh` explains them.

    Attributes:
        source: The file, `scan_forward.cu`, `scan_backward.cu` or `conv.cu`.
        lane_states: States of a lane: 4, 8 or 16.
        taps: Taps of the convolution; 0 for a scan that reads u itself.
    """

    source: str
    wide: bool = False
    narrow: bool = False
    directions: int = 1
    lane_states: int = 4
    taps: int = 0
    softplus: bool = True
    gate: bool = True
    blend: bool = False
    ungated: bool = False

    def macros(self) -> list[str]:
        """Return the macros as options of a compiler."""
        values = {name: value for name, value in vars(self).items() if name != "source"}
        return [f"-D{name.upper()}={int(value)}" for name, value in values.items()]

    def assembler_option(self, arch: str) -> str:
        """Return the option for ptxas with which no register is spilled, found by trial (`benchmarks.gpu_static` tells).

        Level 4 gives the faster code: on an H200 the forward took 7 % longer with level 7.

        Args:
            arch: For example `sm_80`.
        """
        old = int(arch.removeprefix("sm_")) < 90
        scarce = old if self.source == "scan_backward.cu" else self.ungated and not old
        return f"--register-usage-level={7 if scarce else 4}"

    def text(self) -> str:
        """Return everything that decides the result: the options and all sources."""
        return "\n".join([*self.macros(), *((FOLDER / name).read_text() for name in (self.source, *HEADERS))])

    # The layout of shared memory, as the kernels have it.

    @property
    def tile_steps(self) -> int:
        """Steps of a tile."""
        return 64 // self.lane_states

    @property
    def block_channels(self) -> int:
        """Channels that a block of a scan computes at a time."""
        return 64 // self.directions

    def forward_bytes(self, steps: int) -> tuple[int, int]:
        """Return the bytes of shared memory of `scan_forward`: always needed, and to be had there or in global memory."""
        tile = self.directions * self.tile_steps * self.block_channels * 8
        states = self.directions * self.tile_steps * 2 * 4 * self.lane_states * 4
        parts = steps * self.block_channels * 4 * (1 + self.blend) if self.directions == 2 else 0
        return tile + states, parts

    def backward_bytes(self, steps: int) -> tuple[int, int]:
        """Return the same of `scan_backward`."""
        tile = self.directions * self.tile_steps * self.block_channels * 16
        copies = min(self.lane_states, 8)
        states = max(self.directions * self.tile_steps * 2 * copies * 4 * self.lane_states * 4, 16384)
        marks = (-(-steps // self.tile_steps) - 1) * THREADS * self.lane_states * 4
        part = 32 + self.directions * self.block_channels * 8
        return part + tile + states, marks


class Strided(Structure):
    """common.cuh: a tensor (batch, group, channel, step), strides in bytes."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_longlong) for name in ("batch", "group")),
        *((name, c_int) for name in ("channel", "step")),
    ]


class ScanDirection(Structure):
    """scan.cuh: Direction."""

    _fields_ = [
        *((name, Strided) for name in ("delta", "B", "C", "g_p", "p", "g_u", "g_delta")),
        *((name, c_void_p) for name in ("A", "D", "bias", "blend", "conv_weight", "conv_bias")),
        *((name, c_void_p) for name in ("partial_A", "partial_D", "partial_bias")),
        ("u", Strided),
        *((name, c_int) for name in ("reversed", "unused")),
    ]


class ScanCall(Structure):
    """scan.cuh: Scan."""

    _fields_ = [
        *((name, c_int) for name in ("batch", "groups", "channels", "states", "steps", "blocks", "tiles", "unused")),
        *((name, Strided) for name in ("z", "o", "g_o", "g_z")),
        *((name, c_void_p) for name in ("scratch", "partial_BC")),
        ("direction", ScanDirection * 2),
    ]


class ConvFilter(Structure):
    """conv.cu: Filter."""

    _fields_ = [
        *((name, Strided) for name in ("out", "g_out")),
        *((name, c_void_p) for name in ("weight", "bias", "partial_weight", "partial_bias")),
        *((name, c_int) for name in ("reversed", "unused")),
    ]


class ConvCall(Structure):
    """conv.cu: Conv."""

    _fields_ = [
        *((name, c_int) for name in ("batch", "channels", "steps", "blocks", "step_blocks", "unused")),
        *((name, Strided) for name in ("x", "g_x")),
        ("filter", ConvFilter * 2),
    ]


def strided(tensor: Tensor | None) -> Strided:
    """Describe a tensor (Bt, E, L) or (Bt, G, N, L) for a kernel; an absent one has no data.

    Raises:
        ValueError: A stride between channels or steps is 2 GiB or more: the kernels keep those in 32 bits. Offsets are
            computed in 64 bits, so the tensors themselves may be larger.
    """
    if tensor is None:
        return Strided()
    strides, size = tensor.stride(), tensor.element_size()
    batch, group, channel, step = strides if len(strides) == 4 else (strides[0], 0, *strides[1:])
    if max(channel, step) * size >= 2**31:
        raise ValueError(
            f"the kernels take strides below 2 GiB, got {strides} elements of {size} bytes; make the tensor contiguous"
        )
    return Strided(tensor.data_ptr(), size * batch, size * group, size * channel, size * step)


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor."""
    return None if tensor is None else tensor.data_ptr()
