"""Text files of a person, as Excel, Windows and Macs write them; and names as they are shown and compared."""

import os
import unicodedata
from pathlib import Path

from pipeline.errors import DataError

_MAX_FILE_NAME = 255  # bytes, on every file system in use


def read_text(path: Path, what: str) -> str:
    """Return the text of a file in UTF-8 or UTF-16, with or without a byte order mark, or in Windows' Western code page.

    Args:
        path: The file.
        what: What the refusal calls it, for example "list".

    Raises:
        DataError: There is no such file, or it is no text.
    """
    if not path.is_file():  # a FIFO would block for ever
        raise DataError(f"{what} {path} is not a file; give the path of a text file")
    return decode_text(path.read_bytes(), path, what)


def decode_text(content: bytes, path: Path, what: str) -> str:
    """Return the text of a file whose bytes are `content`, as `read_text` does."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encodings = ["utf-16"]
    elif content[1:2] == b"\0" or content[:1] == b"\0":
        encodings = ["utf-16-le" if content[1:2] == b"\0" else "utf-16-be"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise DataError(f"{what} {path} is not a text in UTF-8 or UTF-16; save it as UTF-8")


def shown(name: str) -> str:
    r"""Return a name of the file system as it can be printed: bytes that are not UTF-8 become \xe9."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, from a table
        return name.encode("utf-8", "backslashreplace").decode()


def storable(name: str) -> str:
    """Return a name as valid Unicode: bytes that are not UTF-8 become %E9, and halves of surrogate pairs %uD800."""
    name = "".join(f"%{ord(c) - 0xDC00:02X}" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in name)
    return "".join(f"%u{ord(c):04X}" if 0xD800 <= ord(c) <= 0xDFFF else c for c in name)


def same_form(name: str) -> str:
    """Return the composed Unicode form (NFC); Macs write file names in the other form, which looks the same."""
    return unicodedata.normalize("NFC", name)


def sample_key(member: str) -> str:
    """Return the name of a tar's member up to the first dot of its last component, as WebDataset does."""
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.split(".", 1)[0]


def is_text(text: str) -> bool:
    """Whether a text is Unicode: a lone surrogate is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_file_name(name: str) -> bool:
    """Whether a file of this name can lie directly in a folder."""
    if not is_text(name) or len(name.encode()) > _MAX_FILE_NAME:
        return False
    return not set("/\\\0") & set(name) and name not in ("", ".", "..")
