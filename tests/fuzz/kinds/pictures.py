"""Hostile pictures: damaged, lying about their size, unpacking to far more than they are, or of another kind."""

import io
import random
import struct
import zlib

from tests.fuzz import mutate

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def picture(rng: random.Random) -> bytes:
    """Return the bytes of one picture, which may even be sound."""
    kind = rng.choice((_damaged, _damaged, _damaged, _other, _thin, _claims, _bomb_in_text, _tiff, _animation))
    return kind(rng)


def _sound(rng: random.Random, size: tuple[int, int] | None = None, kind: str = "") -> bytes:
    from PIL import Image

    whole = io.BytesIO()
    mode = rng.choice(("RGB", "L"))
    Image.new(mode, size or (rng.choice((1, 30)), 20)).save(whole, kind or rng.choice(FORMATS))
    return whole.getvalue()


def _damaged(rng: random.Random) -> bytes:
    return mutate.data(rng, _sound(rng))


def _other(rng: random.Random) -> bytes:
    return rng.choice(
        (
            b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n",
            b"%PDF-1.7\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            b"",
            b"\0",
            b"\xff\xd8",
            b"\xff\xd8\xff\xe0" * 1000,
            b"P6 99999 99999 255\n",
            b"P3\n2 2\n255\n" + b"9" * 10_000,
            b"RIFF\xff\xff\xff\x7fWEBPVP8 ",
            b"GIF89a\xff\xff\xff\xff\0\0\0",
            b"\0\0\0\x20ftypavif" + b"\xff" * 200,
        )
    )


def _thin(rng: random.Random) -> bytes:
    length = rng.choice((2_000, 20_000, 60_000))
    return _sound(rng, rng.choice(((length, 1), (1, length), (length, 3))), rng.choice(("PNG", "JPEG", "BMP")))


def _claims(rng: random.Random) -> bytes:
    """A PNG that says that it is huge, with few bytes, or with bytes that unpack to all of it."""
    width, height = rng.choice(
        ((10**9, 1), (1, 10**9), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (8_000, 8_000), (0, 5))
    )
    colours, bits = rng.choice((0, 2, 3, 4, 6)), rng.choice((1, 8, 16))
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, rng.choice((0, 1)))
    content = zlib.compress(bytes(rng.choice((10, 10**6))))
    return _png(("IHDR", header), ("IDAT", content), ("IEND", b""))


def _bomb_in_text(rng: random.Random) -> bytes:
    """A sound PNG with a profile or a text that unpacks to 100 MB."""
    bomb = zlib.compress(bytes(rng.choice((10**5, 10**8))), 9)
    name, content = rng.choice(
        (
            ("iCCP", b"x\0\0" + bomb),
            ("zTXt", b"x\0\0" + bomb),
            ("iTXt", b"x\0\1\0\0\0" + bomb),
            ("eXIf", b"II*\0" + bomb),
        )
    )
    pixels = zlib.compress(b"".join(b"\0" + bytes(24) for _ in range(8)))
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    more = [(name, content)] * rng.choice((1, 30))
    return _png(("IHDR", header), *more, ("IDAT", pixels), ("IEND", b""))


def _png(*chunks: tuple[str, bytes]) -> bytes:
    body = b"".join(
        struct.pack(">I", len(content))
        + name.encode()
        + content
        + struct.pack(">I", zlib.crc32(name.encode() + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _tiff(rng: random.Random) -> bytes:
    """A TIFF of few bytes whose strips, tags or next pages claim anything."""
    side = rng.choice((8, 31_623, 10**9))
    compression = rng.choice((1, 5, 8, 7, 32773, 34712))
    tags = {
        256: side,
        257: side,
        258: 8,
        259: compression,
        262: rng.choice((1, 2, 3, 6)),
        273: rng.choice((8, 200, 2**31)),
        277: rng.choice((1, 3, 60_000)),
        278: side,
        279: rng.choice((64, 2**31 - 1)),
        rng.choice((34675, 700, 330, 34665)): rng.choice((8, 2**31)),
    }
    count = rng.choice((1, 1, 1, 2**31 - 1))
    body = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, value in sorted(tags.items()))
    after = rng.choice((0, 8))  # 8 is this very page: an endless chain
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + body
        + struct.pack("<I", after)
        + zlib.compress(bytes(10**6))
    )


def _animation(rng: random.Random) -> bytes:
    from PIL import Image

    whole = io.BytesIO()
    frames = [Image.new("P", (16, 16), k) for k in range(rng.choice((2, 200)))]
    frames[0].save(whole, rng.choice(("GIF", "WEBP", "TIFF", "PNG")), save_all=True, append_images=frames[1:])
    return mutate.data(rng, whole.getvalue()) if rng.random() < 0.5 else whole.getvalue()
