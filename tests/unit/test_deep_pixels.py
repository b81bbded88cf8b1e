"""Pixels of more than 8 bits that Pillow alone shows otherwise than a viewer."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.images import decode, to_pixels


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("values", [[[0, 65535]], [[0.0, 1.0]]])
def test_deep_greyscale_whose_white_is_zero_is_turned_round(values: list[list[float]]) -> None:
    picture = Image.fromarray(np.array(values, np.uint16 if isinstance(values[0][0], int) else np.float32))
    plain = encode(picture, "TIFF")
    entry, turned = (struct.pack("<HHIHH", 262, 3, 1, photometric, 0) for photometric in (1, 0))
    assert plain.count(entry) == 1
    assert decode(plain)[0, :, 0].tolist() == [0, 255]
    assert decode(plain.replace(entry, turned))[0, :, 0].tolist() == [255, 0]


def test_the_transparent_colour_of_a_png_of_16_bits_is_found() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"\0" + struct.pack(">6H", 500, 500, 500, 40_000, 0, 0)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(
        b"tRNS", struct.pack(">3H", 500, 500, 500)
    )
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    for pixels in (decode(content), to_pixels(Image.open(io.BytesIO(content)))):
        assert pixels.tolist() == [[[255, 255, 255], [156, 0, 0]]]
