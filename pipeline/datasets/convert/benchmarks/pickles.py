"""Read the pickles of CIFAR's python version without running anything that a file names.

A pickle can name any function and have it called. Here it can name only the four that NumPy's arrays and Python 2's strings
need, and even those are stand-ins of this file: they check what they are given and make an array of bytes, or refuse.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.convert.benchmarks.pixels import read_bytes
from pipeline.errors import DataError, first_line


class _Dtype:
    """Stands in for `numpy.dtype`; only bytes without a sign are taken."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if kind not in ("u1", b"u1", "uint8", b"uint8"):
            raise pickle.UnpicklingError(f"an array of {str(kind)[:20]}, not of uint8")

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment mean nothing for single bytes."""


class _Array:
    """Stands in for an array under construction, and holds it once its state has come."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        """Make the array of (version, shape, dtype, column-major, bytes), as NumPy states it."""
        _, shape, dtype, transposed, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # a text of Python 2
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(shape) > 4:
            raise pickle.UnpicklingError("an array that is no table of bytes")
        if not all(type(side) is int and side >= 0 for side in shape) or np.prod([float(s) for s in shape]) != len(
            data
        ):
            raise pickle.UnpicklingError(f"an array of {len(data)} bytes that claims the shape {tuple(shape)}")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if transposed else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: Any, *_: Any) -> bytes:
    if not isinstance(text, str):
        raise pickle.UnpicklingError("bytes that are no text")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


# Python's own reader and not the one in C: that allocates a table as large as the highest index which a file claims.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of an allowed name.

        Raises:
            UnpicklingError: Any other name.
        """
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}"[:80])
        return _ALLOWED[module, name]


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a batch or a table of names; nothing that the file names is called.

    Returns:
        Its entries by name; arrays of bytes are NumPy's, texts are str.

    Raises:
        DataError: It is no dictionary, damaged, or names anything but arrays and plain values.
    """
    data = read_bytes(path)
    try:
        found = _Reader(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is not read: it holds {error}; a batch of CIFAR has arrays of bytes and plain values only"
        ) from None
    except MemoryError:
        raise DataError(f"{path} does not fit in memory; it is damaged, unpack the benchmark's archive again") from None
    except Exception as error:  # damaged bytes raise errors of many classes
        said = f"{type(error).__name__}: {first_line(error, 100)}"
        raise DataError(f"{path} is damaged ({said}); unpack the benchmark's archive again") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise DataError(f"{path} holds no table of names; it is no batch of CIFAR")
    return {
        name: value.value if isinstance(value, _Array) and hasattr(value, "value") else value
        for name, value in found.items()
    }
