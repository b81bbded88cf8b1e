"""A safetensors file written and hashed in one pass that frees the interpreter: a save must not stall training.

The own writer of safetensors first turns every tensor into a Python bytes object, under the interpreter's lock.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK = 16 * 2**20  # bytes per write: large enough to release the lock, small enough that a signal need not wait


def write_shards(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write flat fp32 CPU tensors, and return when they are on the disk.

    Args:
        path: The file to write.
        tensors: Contiguous fp32 tensors (numel,) on the CPU, by key.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: If the disk refuses.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise TypeError(f"{name} is {tensor.dtype}; checkpoints hold contiguous fp32")
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        pieces: list[Any] = [struct.pack("<Q", len(text)) + text, *(tensor.numpy() for tensor in tensors.values())]
        for view in (memoryview(piece).cast("B") for piece in pieces):
            for begin in range(0, len(view), _CHUNK):
                chunk = view[begin : begin + _CHUNK]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return digest.hexdigest()
