"""A strict reader of tars: a shard that is cut off, hostile or not plain is refused, never read in part.

Python's tarfile takes a damaged header for the end of the archive and silently drops the rest, so the headers are read
here. Members are only read: none is written anywhere, no link is followed, nothing is unpickled.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.datasets.manifest import Shard, ShardIndex, sample_key
from pipeline.errors import DataError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "gif", "tif", "tiff")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 64 * 2**10  # labels, long names and pax records
_MAX_DIGITS = 20  # of a number in a pax header; Python refuses to read thousands
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}


@dataclass(frozen=True)
class Member:
    """A regular file in a tar.

    Attributes:
        name: Its path in the tar.
        offset: Its first byte in the tar.
        size: Bytes.
    """

    name: str
    offset: int
    size: int


def scan_shard(path: Path, num_classes: int | None = None) -> ShardIndex:
    """Scan one tar: its checksum and its samples, whose labels are the numbers in the `cls` members.

    Args:
        path: The tar.
        num_classes: Refuse labels from this number on; None = any number is a label.

    Returns:
        The shard and its samples; the label of a sample without a `cls` member is -1.

    Raises:
        DataError: The tar holds anything but complete, plain, uniquely named samples.
    """
    if not path.is_file():  # a FIFO would be waited for
        raise DataError(f"{path} is no regular file; remove it from the folder of shards")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        try:
            return _index(file, path.name, size, digest, num_classes)
        except DataError as error:
            raise DataError(f"{path}: {error}; remove or rewrite this shard") from None


def read_members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Yield the regular files of a tar of `size` bytes, in order.

    Raises:
        DataError: At the first thing that is not right.
    """
    offset, long_name, long_size = 0, "", -1
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            break
        if len(header) < BLOCK:
            raise DataError(f"cut off at byte {offset}: no end-of-archive mark")
        name, length, kind = _parse(header, offset)
        data = offset + BLOCK
        length = long_size if long_size >= 0 else length
        offset = data + -(-length // BLOCK) * BLOCK
        if data + length > size:
            raise DataError(f"member {name!r} ends at byte {data + length} of {size}: the tar is cut off")
        if kind in (b"x", b"L", b"g", b"K"):
            if length > MAX_TEXT_BYTES:
                raise DataError(f"a header record of {length} bytes at byte {data}; at most {MAX_TEXT_BYTES}")
            if kind == b"x":
                long_name, long_size = _pax(file.read(length), long_name)
            elif kind == b"L":
                long_name = _text(file.read(length).rstrip(b"\0"))
            continue
        name, long_name, long_size = long_name or name, "", -1
        if kind == b"5":
            continue
        if kind not in (b"0", b"\0"):
            raise DataError(f"member {name!r} is {_KINDS.get(kind, 'no regular file')}; shards hold plain files only")
        yield Member(_safe(name), data, length)
    file.seek(offset)
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(f"data after the end-of-archive mark at byte {offset}: several tars in one file?")


def _index(file: BinaryIO, name: str, size: int, digest: str, num_classes: int | None) -> ShardIndex:
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    for member in list(read_members(file, size)):
        key = sample_key(member.name)
        extension = member.name[len(key) + 1 :].lower()
        if extension in IMAGE_EXTENSIONS:
            if key in images:
                raise DataError(f"sample {key!r} has two images")
            if not 0 < member.size <= MAX_IMAGE_BYTES:
                raise DataError(f"image {member.name!r} has {member.size} bytes; allowed are 1 to {MAX_IMAGE_BYTES}")
            images[key] = member
        elif extension == "cls":
            if key in labels:
                raise DataError(f"sample {key!r} has two labels")
            labels[key] = _label(file, member, num_classes)
    if labels and images.keys() - labels.keys():
        raise DataError(f"sample {min(images.keys() - labels.keys())!r} has no cls member, though others have")
    found = list(images.values())
    return ShardIndex(
        shard=Shard(name=name, size=size, sha256=digest, count=len(found)),
        members=[member.name for member in found],
        offsets=[member.offset for member in found],
        lengths=[member.size for member in found],
        labels=[labels.get(key, -1) for key in images],
    )


def _label(file: BinaryIO, member: Member, num_classes: int | None) -> int:
    file.seek(member.offset)
    text = file.read(min(member.size, 32)).strip()
    if not text.isdigit():
        raise DataError(f"label {member.name!r} is {text!r}, not a class number")
    label = int(text)
    if num_classes is not None and label >= num_classes:
        raise DataError(f"label {member.name!r} is {label}, but there are {num_classes} classes")
    return label


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes]:
    """Return name, size and kind of a ustar or GNU header whose checksum holds."""
    field = header[148:156]
    try:
        stated = int(field.strip(b"\0 ") or b"x", 8)
        size = int.from_bytes(header[125:136]) if header[124] & 0x80 else int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise DataError(f"no tar header at byte {offset}") from None
    if stated != sum(header) - sum(field) + 8 * 0x20:
        raise DataError(f"the header at byte {offset} does not match its checksum")
    if size < 0:
        raise DataError(f"the header at byte {offset} states a negative size")
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name), size, header[156:157]


def _pax(record: bytes, name: str) -> tuple[str, int]:
    """Return the path and size of a pax header; only these two change what is read."""
    size = -1
    while record.strip(b"\0"):
        length, _, _ = record.partition(b" ")
        if not length.isdigit() or len(length) > _MAX_DIGITS or not len(length) < int(length) <= len(record):
            raise DataError("a pax header that cannot be read")
        key, _, value = record[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > _MAX_DIGITS:
                raise DataError(f"a pax header with size {value[:40]!r}")
            size = int(value)
        record = record[int(length) :]
    return name, size


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise DataError(f"member name {raw[:80]!r} is not UTF-8") from None


def _safe(name: str) -> str:
    name = name.removeprefix("./")
    if not name or name.startswith("/") or "\0" in name or "\\" in name or ".." in name.split("/"):
        raise DataError(f"member {name!r} points outside the dataset")
    return name
