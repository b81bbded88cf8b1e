"""What a weights file claims to hold, checked against the file and the memory before anything is unpacked (torch-free).

A header of a few bytes can claim 10^12 values, and a compressed archive can hold them. So the claims are added up first.
The limits on headers keep the time below a second: the largest checkpoints that we know have some 10,000 tensors.
"""

import contextlib
import io
import json
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from pipeline.errors import HandoverError, first_line

MAX_HEADER = 4 * 2**20  # bytes of names, types and shapes
MAX_TENSORS = 20_000
_MAX_OPCODES = 300_000  # instructions of a pickle; a tensor takes some 25
_MEMORY_SHARE = 0.9  # share of the free memory that a file may fill
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


class Claim(NamedTuple):
    """The type and shape of one tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def read_safetensors_header(path: Path, *, whole: bool = True) -> dict[str, Claim]:
    """Return what a safetensors file claims to hold, by name.

    Args:
        path: The file.
        whole: Whether all of it will be in memory at once.

    Raises:
        HandoverError: The header is damaged or too large, contradicts the file's size, or claims more than fits in memory.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise HandoverError(f"{path} is no safetensors file, or damaged: its header is longer than the file")
        if length > MAX_HEADER:
            raise HandoverError(f"{path} is not read: its header has {length} bytes, at most {MAX_HEADER} are allowed")
        text = file.read(length)
    try:
        claims = _parse(text, size - 8 - length)
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise HandoverError(f"{path} is no safetensors file, or damaged: {first_line(error)}") from None
    if whole:
        check_memory(path, size)
    return claims


def _parse(text: bytes, held: int) -> dict[str, Claim]:
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header)} tensors, at most {MAX_TENSORS} are read")
    claims: dict[str, Claim] = {}
    spans: list[tuple[int, int]] = []
    for name, value in header.items():
        shape, (begin, end) = value["shape"], value["data_offsets"]
        if value["dtype"] not in _ITEM_BYTES:
            raise ValueError(f"{name[:100]} has the unknown type {str(value['dtype'])[:20]}")
        if not all(isinstance(number, int) and 0 <= number < 2**53 for number in (*shape, begin, end)):
            raise ValueError(f"{name[:100]} has a shape or a place that is no whole number")
        if end > held or end - begin != math.prod(shape) * _ITEM_BYTES[value["dtype"]]:
            raise ValueError(f"{name[:100]} claims more values than the file holds")
        claims[name] = Claim(value["dtype"], tuple(shape))
        spans.append((begin, end))
    covered = 0
    for begin, end in sorted(spans):
        if begin != covered:
            raise ValueError(f"its tensors overlap or leave a gap at byte {covered}")
        covered = end
    if covered != held:
        raise ValueError(f"its tensors take {covered} bytes, but it holds {held}")
    return claims


def check_archive(path: Path) -> None:
    """Check the sizes inside a zip archive of torch.

    Raises:
        HandoverError: A member is compressed, the sizes contradict the file's, there are too many members, or all of them
            together do not fit in memory.
    """
    size = path.stat().st_size
    pickles: list[bytes] = []
    try:
        with path.open("rb") as file:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # zipfile would read a million entries first
        if end is None or end[4] > MAX_TENSORS * 2 or end[5] > 2 * MAX_HEADER:
            raise zipfile.BadZipFile("it has too many members" if end else "its directory is missing")
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _check_members(path, members, size)
            pickles += [archive.read(member) for member in members if member.filename.endswith(".pkl")]
    except HandoverError:
        raise
    except Exception as error:  # zipfile raises errors of many classes for damaged archives
        raise HandoverError(f"{path} is no torch checkpoint, or damaged: {str(error)[:200]}") from None
    for content in pickles:
        _count_opcodes(path, io.BytesIO(content), pickles=1)
    check_memory(path, size)


def _check_members(path: Path, members: list[zipfile.ZipInfo], size: int) -> None:
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise HandoverError(
            f"{path} is not read: it is compressed, which torch's checkpoints are not; save its state dict as safetensors"
        )
    claimed = sum(member.file_size for member in members)
    if claimed > size:
        raise HandoverError(f"{path} is damaged: its members claim {claimed} bytes, the file has {size}")
    described = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
    if described > MAX_HEADER:
        raise HandoverError(
            f"{path} is not read: its description of tensors has {described} bytes, at most {MAX_HEADER} are allowed; save"
            " its state dict as safetensors"
        )


def check_bare_pickle(path: Path) -> None:
    """Check the length of the pickles at the start of a file of torch's oldest format.

    Raises:
        HandoverError: They have more instructions than any checkpoint.
    """
    with path.open("rb") as file:
        _count_opcodes(path, file, pickles=4)  # magic number, protocol, system, objects; the tensors' numbers follow
    check_memory(path, path.stat().st_size)


def _count_opcodes(path: Path, file: IO[bytes], pickles: int) -> None:
    """Refuse pickles that torch would read for seconds. What is damaged is left to torch, which says what is wrong."""
    left = _MAX_OPCODES
    with contextlib.suppress(Exception):  # pickletools raises errors of many classes
        for _ in range(pickles):
            for _ in pickletools.genops(file):
                left -= 1
                if left < 0:
                    break
            if left < 0:
                break
    if left < 0:
        raise HandoverError(
            f"{path} is not read: it has over {_MAX_OPCODES} instructions; save its state dict as safetensors"
        )


def check_memory(path: Path, size: int) -> None:
    """Raise HandoverError if `size` bytes of a file do not fit in the memory that is free."""
    free = psutil.virtual_memory().available
    if size > _MEMORY_SHARE * free:
        raise HandoverError(
            f"{path} holds {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; read it on a larger machine"
        )
