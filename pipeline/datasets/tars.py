"""A strict reader of tars: a shard that is cut off, hostile or not plain is refused, never read in part.

Python's tarfile takes a damaged header for the end of the archive and silently drops the rest, so the headers are read
here. Members are only read: none is written anywhere, no link is followed, nothing is unpickled.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.datasets.formats import FOREIGN_EXTENSIONS, HEAD, IMAGE_EXTENSIONS, format_of, is_hidden
from pipeline.datasets.manifest import Shard, ShardIndex
from pipeline.datasets.text import sample_key
from pipeline.errors import DataError

BLOCK = 512
MAX_IMAGE_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 64 * 2**10  # labels, long names and pax records
_MAX_LABEL_DIGITS = 9  # longest class number, which the manifest keeps in four bytes
_MOST_LETTERS = 4_096  # bytes of a member's name; no file system takes longer paths
_MAX_PAX_DIGITS = 20  # longest number in a pax header; Python refuses to read thousands
_TEXT_EXTENSIONS = ("cls", "txt", "json", "id", "key", "url", "caption", "npy", "pyd", "pth")
_ABSENT = object()
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
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


@dataclass(frozen=True)
class MemberRules:
    """Which members of a tar are images and labels.

    Attributes:
        image_key: Extension of the images, after the first dot of the name, for example "input.jpg"; empty = the
            ending or the content of an image.
        label_key: Extension of the members that hold the labels, or a field of the `json` members (`a.b` for one inside
            another); empty = `cls`.
        skip_unreadable: Leave out samples that cannot be used, instead of refusing the shard.
    """

    image_key: str = ""
    label_key: str = ""
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Scan:
    """What a tar holds.

    Attributes:
        index: The shard and its samples. The labels are numbers; where the labels are texts, -1.
        texts: Label of each sample as it was read; empty where there is none.
        left_out: Names of the members that are no part of a sample, by the reason.
    """

    index: ShardIndex
    texts: list[str]
    left_out: dict[str, list[str]]


def scan_shard(path: Path, num_classes: int | None = None, rules: MemberRules | None = None) -> ShardIndex:
    """Scan one tar: its checksum and its samples, whose labels are the numbers in the `cls` members.

    Args:
        path: The tar.
        num_classes: Refuse labels from this number on; None = any number is a label.
        rules: Which members are images and labels.

    Returns:
        The shard and its samples; the label of a sample without a `cls` member is -1.

    Raises:
        DataError: The tar holds anything but complete, plain, uniquely named samples.
    """
    index = scan_members(path, num_classes, rules or MemberRules()).index
    if 0 in index.lengths:
        name = index.members[index.lengths.index(0)]
        raise DataError(
            f"{path}: image {name!r} has 0 bytes; allowed are 1 to {MAX_IMAGE_BYTES}; remove or rewrite this shard"
        )
    return index


def scan_members(path: Path, num_classes: int | None, rules: MemberRules) -> Scan:
    """Scan one tar as `scan_shard` does, and return its labels as they are written too."""
    if not path.is_file():  # a FIFO would be waited for
        raise DataError(f"{path} is no regular file; remove it from the folder of shards")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        try:
            return _index(file, path.name, size, digest, num_classes, rules)
        except DataError as error:
            advice = "" if "--" in str(error) else "; remove or rewrite this shard"
            raise DataError(f"{path}: {error}{advice}") from None


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


def _index(file: BinaryIO, name: str, size: int, digest: str, num_classes: int | None, rules: MemberRules) -> Scan:
    images: dict[str, Member] = {}
    texts: dict[str, str] = {}
    labelled: dict[str, str] = {}  # name of the member with the label, by key
    left_out: dict[str, list[str]] = {}
    for member in list(read_members(file, size)):
        key = sample_key(member.name)
        extension = member.name[len(key) + 1 :].lower()
        if is_hidden(member.name.rpartition("/")[2]) or any(map(is_hidden, member.name.split("/")[:-1])):
            left_out.setdefault("hidden or of the system", []).append(member.name)
        elif _holds_label(extension, rules):
            if key in labelled:
                raise DataError(f"sample {key!r} has two labels")
            text = _label_text(file, member, extension, rules)
            if text is not None:
                labelled[key], texts[key] = member.name, text
        elif _holds_image(file, member, extension, rules):
            _check_image(member, extension, rules, key in images, key)
            images[key] = member
        elif extension.endswith(".cls") and not rules.label_key:
            raise DataError(
                f"member {member.name!r} has the compound ending {extension!r}; say which members hold the labels with "
                f"--label-key {extension} (--label-key none = without labels)"
            )
        else:
            left_out.setdefault(f"member .{extension}", []).append(member.name)
    lost = [labelled[key] for key in labelled if key not in images]
    if lost and not rules.skip_unreadable:
        raise DataError(
            f"{len(lost)} labels have no image that is read here: {', '.join(lost[:20])}"
            f"{' and more' if len(lost) > 20 else ''}; leave them out with --skip-unreadable, or add the images"
        )
    if lost:
        left_out["label without an image"] = lost
    found = list(images.values())
    index = ShardIndex(
        shard=Shard(name=name, size=size, sha256=digest, count=len(found)),
        members=[member.name for member in found],
        offsets=[member.offset for member in found],
        lengths=[member.size for member in found],
        labels=[_number(texts.get(key, ""), labelled.get(key, ""), num_classes, rules) for key in images],
    )
    return Scan(index, ["" if texts.get(key) == "-1" else texts.get(key, "") for key in images], left_out)


def _holds_image(file: BinaryIO, member: Member, extension: str, rules: MemberRules) -> bool:
    if rules.image_key:
        return extension == rules.image_key.lower().lstrip(".")
    ending = extension.rpartition(".")[2]
    if ending in IMAGE_EXTENSIONS or ending in FOREIGN_EXTENSIONS:
        return True
    if ending in _TEXT_EXTENSIONS:
        return False
    file.seek(member.offset)
    return bool(format_of(file.read(min(HEAD, member.size))))


def _check_image(member: Member, extension: str, rules: MemberRules, known: bool, key: str) -> None:
    if "." in extension and not rules.image_key:
        raise DataError(
            f"image {member.name!r} has the compound ending {extension!r}; say which members are the images with "
            f"--image-key {extension}"
        )
    if known:
        raise DataError(f"sample {key!r} has two images")
    if member.size > MAX_IMAGE_BYTES:
        raise DataError(f"image {member.name!r} has {member.size} bytes; allowed are 1 to {MAX_IMAGE_BYTES}")


def _holds_label(extension: str, rules: MemberRules) -> bool:
    wanted = rules.label_key.lower().lstrip(".") or "cls"
    return extension == wanted or (extension == "json" and bool(rules.label_key))


def _label_text(file: BinaryIO, member: Member, extension: str, rules: MemberRules) -> str | None:
    """Return a label as it is written; empty where the sample has none, None if the member is not the one that counts."""
    if member.size > MAX_TEXT_BYTES:
        raise DataError(f"label {member.name!r} has {member.size} bytes; at most {MAX_TEXT_BYTES}")
    file.seek(member.offset)
    data = file.read(member.size)
    if extension != "json" or rules.label_key.lower() == "json":
        try:
            return data.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise DataError(f"label {member.name!r} is {data[:32]!r}, which is no text") from None
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"member {member.name!r} is no JSON ({type(error).__name__})") from None
    label = _field(value, rules.label_key)
    if label is _ABSENT:
        return None
    if label is None:
        return ""
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(
            f"member {member.name!r} has {label!r} as {rules.label_key!r}, which is no class number or name"
        )
    return str(label).strip()


def _field(value: Any, key: str) -> Any:
    """Return a field of a JSON object, `a.b` also that of an object in a field; `_ABSENT` if it has none."""
    if isinstance(value, dict) and key in value:
        return value[key]
    first, dot, rest = key.partition(".")
    return _field(value[first], rest) if dot and isinstance(value, dict) and first in value else _ABSENT


def _number(text: str, member: str, num_classes: int | None, rules: MemberRules) -> int:
    """Return a label that is a number; -1 for none, and for a name where names are allowed."""
    if text == "-1" or (not text and (rules.label_key or not member)):
        return -1
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_LABEL_DIGITS):
        if rules.label_key:
            return -1
        raise DataError(
            f"label {member!r} is {text[:32].encode()!r}, not a class number; --label-key cls reads class names"
        )
    label = int(text)
    if num_classes is not None and label >= num_classes:
        raise DataError(f"label {member!r} is {label}, but there are {num_classes} classes")
    return label


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes]:
    """Return name, size and kind of a ustar or GNU header whose checksum holds."""
    field = header[148:156]
    try:
        stated = int(field.strip(b"\0 ") or b"x", 8)
        size = int.from_bytes(header[125:136]) if header[124] & 0x80 else int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        packed = next((name for start, name in _COMPRESSED.items() if not offset and header.startswith(start)), "")
        found = f"it is compressed with {packed}, decompress it" if packed else f"no tar header at byte {offset}"
        raise DataError(found) from None
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
        if not length.isdigit() or len(length) > _MAX_PAX_DIGITS or not len(length) < int(length) <= len(record):
            raise DataError("a pax header that cannot be read")
        key, _, value = record[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > _MAX_PAX_DIGITS:
                raise DataError(f"a pax header with size {value[:40]!r}")
            size = int(value)
        record = record[int(length) :]
    return name, size


def _text(raw: bytes) -> str:
    if len(raw) > _MOST_LETTERS:
        raise DataError(f"member name {raw[:40]!r}... has {len(raw)} bytes; at most {_MOST_LETTERS} are read")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise DataError(f"member name {raw[:80]!r} is not UTF-8") from None


def _safe(name: str) -> str:
    name = name.removeprefix("./")
    if not name or name.startswith("/") or "\0" in name or "\\" in name or ".." in name.split("/"):
        raise DataError(f"member {name!r} points outside the dataset")
    return name
