"""Which files are images, by their first bytes and by their ending, and which names are no part of a dataset."""

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "ppm", "gif", "tif", "tiff"),
    *("avif", "jfif", "jpe", "mpo", "apng", "dib", "pgm", "pbm", "pnm"),
)
# Pictures in formats that are not read. Such a file in a dataset is named and never passed over.
FOREIGN_EXTENSIONS = (
    *(
        "heic",
        "heif",
        "hif",
        "jp2",
        "j2k",
        "jpx",
        "jxl",
        "psd",
        "svg",
        "eps",
        "tga",
        "ico",
        "icns",
        "exr",
        "hdr",
        "pcx",
    ),
    *("raw", "cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf", "xcf"),
)
# Folders and files that systems and programs leave beside the images of a person.
SYSTEM_NAMES = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
HEAD = 32  # bytes that `format_of` needs


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to a system and not to the dataset: `._cat.jpg`, `__MACOSX`."""
    return name.startswith(".") or name in SYSTEM_NAMES


def extension_of(name: str) -> str:
    """Return the last ending of a file name in small letters, without the dot; empty if there is none."""
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""


def format_of(head: bytes) -> str:
    """Return the usual ending of the image format that a file begins with; empty if it begins like no image.

    The ending of a foreign format is in `FOREIGN_EXTENSIONS`, that of any other format in `IMAGE_EXTENSIONS`.

    Args:
        head: The first `HEAD` bytes of the file, or more.
    """
    for magic, extension in _MAGIC:
        if head.startswith(magic):
            return extension
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and len(head) > 14:
        return "bmp"
    if (
        head[:1] == b"P"
        and head[1:2] in b"123456"
        and head[2:3].isspace()
        and (head[3:4].isdigit() or head[3:4] == b"#")
    ):
        return "ppm"
    if head[4:8] == b"ftyp":
        brands = head[8:HEAD]
        return "avif" if b"avi" in brands else "heic" if b"hei" in brands or b"mif1" in brands else ""
    return ""


_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xffO\xffQ", "j2k"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
    (b"8BPS", "psd"),
)
