"""The one place where bytes become pixels: what a person sees, from the formats that are accepted, within the limits."""

import ast
import contextlib
import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pipeline.decoding import Decoding
from pipeline.images import (
    FORMATS,
    Notes,
    TooLarge,
    UnreadableImage,
    decode,
    decode_with_pillow,
    decode_with_simplejpeg,
    read_header,
    to_pixels,
)

ROOT = Path(__file__).resolve().parents[2]
ORIENTATION = 0x0112
DECODERS = [decode_with_pillow, decode_with_simplejpeg]
# What a viewer does to the stored picture, in Pillow's words (EXIF 2.3, table 6).
VIEWERS = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str, width: int, height: int, seed: int) -> Image.Image:
    """A random picture of any of Pillow's modes."""
    draw = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 65536, (height, width), np.uint16))
    if mode == "1":
        return Image.fromarray(draw.integers(0, 2, (height, width)).astype(bool))
    if mode in ("P", "L"):
        picture = Image.fromarray(draw.integers(0, 256, (height, width), np.uint8))
        if mode == "P":
            picture = Image.frombytes("P", (width, height), picture.tobytes())
            picture.putpalette(draw.integers(0, 256, 768, np.uint8).tobytes())
        return picture
    bands = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    return Image.frombytes(mode, (width, height), draw.integers(0, 256, (height, width, bands), np.uint8).tobytes())


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("L", "P", "RGB"),
    "PPM": ("L", "RGB"),
    "GIF": ("L", "P"),
}


def by_hand(stored: Image.Image, ground: tuple[int, int, int], orientation: int) -> np.ndarray:
    """What a person sees of the stored picture, from Pillow's conversions and the formulas."""
    if stored.mode == "I;16":
        grey = np.rint(np.asarray(stored) / 257).astype(np.uint8)
        seen = Image.fromarray(np.repeat(grey[..., None], 3, 2))
    else:
        rgba = np.asarray(stored.convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        pixels = np.asarray(stored.convert("RGB")) if (alpha == 1).all() else None
        mixed = np.rint(rgba[..., :3] * alpha + np.array(ground) * (1 - alpha)).astype(np.uint8)
        seen = Image.fromarray(mixed if pixels is None else pixels)
    for turn in VIEWERS[orientation]:
        seen = seen.transpose(turn)
    return np.asarray(seen)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_mode_size_format_and_orientation_is_what_pillow_and_the_formulas_give(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MODES)))
    mode = data.draw(st.sampled_from(MODES[kind]))
    size = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    ground = data.draw(st.tuples(*[st.integers(0, 255)] * 3))
    turned = kind in ("PNG", "TIFF", "JPEG", "WEBP")
    orientation = data.draw(st.integers(1, 8)) if turned else 1
    picture, options = noise(mode, *size, data.draw(st.integers(0, 99))), {}
    if turned:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    if mode == "P" and kind in ("PNG", "GIF") and data.draw(st.booleans()):
        options["transparency"] = 7
    content = encode(picture, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    stored = picture
    if kind in ("JPEG", "GIF") or "transparency" in options:
        stored = Image.open(io.BytesIO(content))
    expected = by_hand(stored, ground, orientation)
    for decoder in DECODERS:
        pixels = decoder(content, Decoding(ground=ground))
        assert pixels.dtype == np.uint8
        assert pixels.shape == expected.shape
        assert pixels.flags.c_contiguous
        assert np.abs(pixels.astype(int) - expected).max() <= 1  # Pillow rounds the mean of two colours in integers
        if mode != "RGBA" and mode != "LA":
            assert (pixels == expected).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_black_drawing_on_a_transparent_ground_is_black_on_white_and_is_counted(mode: str) -> None:
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[20:40, 20:40, 3] = 255
    picture = Image.fromarray(drawing)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    notes = Notes()
    pixels = decode(encode(picture, "PNG"), notes=notes)
    assert (pixels[20:40, 20:40] == 0).all()
    assert pixels.mean() == pytest.approx(255 * (1 - 400 / 4096))
    assert (decode(encode(picture, "PNG"), Decoding(ground=(0, 0, 255)))[0, 0] == (0, 0, 255)).all()
    assert notes == {"transparent": 1}
    opaque = Notes()
    decode(encode(Image.new("RGBA", (4, 4), (1, 2, 3, 255)), "PNG"), notes=opaque)
    assert not opaque


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(0, 65535, 256, dtype=np.uint16), "PNG"),
        (np.linspace(0, 65535, 256, dtype=np.uint16), "TIFF"),
        (np.linspace(0, 65535, 256, dtype=np.int32), "TIFF"),
        (np.linspace(-(2**31), 2**31 - 1, 256).astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 256, dtype=np.float32), "TIFF"),
        (np.linspace(0, 255, 256, dtype=np.float32), "TIFF"),
        (np.linspace(-3e38, 3e38, 256, dtype=np.float32), "TIFF"),
        (np.arange(256, dtype=np.int32), "TIFF"),
    ],
)
def test_deep_greyscale_fills_0_to_255(values: np.ndarray, kind: str) -> None:
    notes = Notes()
    pixels = decode(encode(Image.fromarray(np.tile(values, (4, 1))), kind), notes=notes)
    assert np.abs(pixels[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert notes == {"range": 1}


def test_deep_greyscale_keeps_known_ranges_and_survives_what_is_no_number() -> None:
    def seen(values: np.ndarray) -> list[int]:
        return decode(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist()

    assert seen(np.array([[0.5, 0.25]], np.float32)) == [128, 64]
    assert seen(np.array([[100, 50]], np.int32)) == [100, 50]
    assert seen(np.array([[4096, 1]], np.uint16)) == [16, 0]
    assert seen(np.array([[np.nan, -np.inf, np.inf, 0, 1000]], np.float32)) == [0, 0, 255, 0, 255]
    assert seen(np.full((1, 2), np.nan, np.float32)) == [0, 0]
    assert seen(np.full((1, 2), 7000, np.int32)) == [0, 0]
    pgm = b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 0)
    assert decode(pgm)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decode(content) == (255, 0, 0)).all()


def test_a_png_with_large_texts_or_a_large_profile_is_read() -> None:
    picture = noise("RGB", 9, 7, 0)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("comment", "x" * 3_000_000, zip=True)
    texts.add_itxt("more", "y" * 3_000_000)
    content = encode(picture, "PNG", pnginfo=texts, icc_profile=bytes(3_000_000))
    assert (decode(content) == np.asarray(picture)).all()
    assert read_header(content).format == "PNG"


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_large_jpeg_is_decoded_at_a_reduced_scale_and_another_format_is_refused(decoder, progressive) -> None:
    picture = Image.new("RGB", (300, 200), (200, 100, 50))
    content = encode(picture, "JPEG", progressive=progressive)
    for limit, size in ((60_000, (200, 300)), (59_999, (100, 150)), (15_000, (100, 150)), (14_999, (50, 75))):
        if progressive and limit * 2 < 60_000:
            with pytest.raises(TooLarge, match=r"300 x 200 pixels; at most 1.,... are decoded.*data\.max_pixels"):
                decoder(content, Decoding(max_pixels=limit))
            continue
        notes = Notes()
        pixels = decoder(content, Decoding(max_pixels=limit), notes)
        assert pixels.shape[:2] == size
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 4
        assert notes == ({} if limit == 60_000 else {"reduced": 1})
    with pytest.raises(TooLarge, match="300 x 200 pixels"):
        decoder(content, Decoding(max_pixels=60_000 // 16 - 1))
    for kind in ("PNG", "BMP", "TIFF"):
        with pytest.raises(TooLarge, match=r"300 x 200 pixels; at most 59,999 are decoded.*data\.max_pixels"):
            decoder(encode(picture, kind), Decoding(max_pixels=59_999))


def test_a_reduced_jpeg_is_upright() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = encode(Image.new("RGB", (300, 200)), "JPEG", exif=exif)
    assert decode(content, Decoding(max_pixels=30_000)).shape == (150, 100, 3)


def test_a_bomb_is_refused_without_its_memory() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (60_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(TooLarge, match=r"3,600,000,000 pixels; at most 64,000,000 are decoded"):
        decode(bomb)
    with pytest.raises(TooLarge, match="at most"):
        read_header(bomb)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
REFUSED = {
    "PostScript": POSTSCRIPT,
    "PostScript in a DOS envelope": b"\xc5\xd0\xd3\xc6"
    + struct.pack("<6I", 30, len(POSTSCRIPT), 0, 0, 0, 0)
    + b"\xff\xff"
    + POSTSCRIPT,
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a page": b"<!DOCTYPE html><html>404</html>",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "icon": encode(Image.new("RGB", (16, 16)), "ICO"),
    "TGA": encode(Image.new("RGB", (16, 16)), "TGA"),
    "PCX": encode(Image.new("RGB", (16, 16)), "PCX"),
    "JPEG 2000": encode(Image.new("RGB", (16, 16)), "JPEG2000"),
    "DDS": encode(Image.new("RGB", (16, 16)), "DDS"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_and_start_no_program(name: str, tmp_path: Path, monkeypatch) -> None:
    for program in ("gs", "gswin64c", "heif-convert"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    Image.init()  # as another library may have done; all of Pillow's readers are there now
    for read in (*DECODERS, read_header):
        with pytest.raises(UnreadableImage, match="not a readable image"):
            read(REFUSED[name])
    assert not (tmp_path / "ran").exists()


def test_a_format_is_recognised_by_its_content_and_named_in_the_refusal() -> None:
    with pytest.raises(UnreadableImage, match=f"its content is PostScript; accepted are {', '.join(FORMATS)}"):
        decode(POSTSCRIPT)
    assert read_header(encode(Image.new("RGB", (4, 4)), "WEBP")).format == "WEBP"


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_bytes_give_pixels_or_a_refusal(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MODES)))
    picture = noise(data.draw(st.sampled_from(MODES[kind])), 24, 17, 0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = bytearray(encode(picture, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {})))
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(draw.randint(1, 6)):
        start = draw.randrange(min(len(content), draw.choice((64, len(content)))))
        content[start : start + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 4))
    for decoder in DECODERS:
        with contextlib.suppress(UnreadableImage):
            pixels = decoder(bytes(content), Decoding(max_pixels=1_000_000))
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3


def test_damaged_metadata_say_nothing_about_the_pixels() -> None:
    picture = noise("RGB", 16, 8, 0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = encode(picture, "JPEG", exif=exif)
    broken = content.replace(b"Exif\0\0MM\0*", b"Exif\0\0??\0*").replace(b"Exif\0\0II*\0", b"Exif\0\0??*\0")
    assert broken != content
    for decoder in DECODERS:
        assert decoder(broken).shape == (8, 16, 3)


@pytest.mark.parametrize("before", [b"\xff\xed\0\x08\xff\xda\xff\xda\0\0", b"\xff"])
def test_an_orientation_counts_behind_what_looks_like_pixels(before: bytes) -> None:
    """A segment with a thumbnail in it, and a fill byte."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = encode(noise("RGB", 16, 8, 0), "JPEG", exif=exif)
    at = content.index(b"\xff\xe1")
    for decoder in DECODERS:
        assert decoder(content[:at] + before + content[at:]).shape == (16, 8, 3)


def test_a_pillow_image_is_seen_as_its_file_is() -> None:
    for picture in (noise("RGBA", 9, 7, 0), noise("I;16", 9, 7, 0), noise("P", 9, 7, 0)):
        assert (to_pixels(picture) == decode(encode(picture, "PNG"))).all()
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    assert to_pixels(Image.open(io.BytesIO(encode(noise("RGB", 9, 7, 0), "PNG", exif=exif)))).shape == (9, 7, 3)


READERS = ("imread", "imdecode", "decode_image", "default_loader", "decode_jpeg_header")
LIBRARIES = ("PIL.JpegImagePlugin", "PIL.ImageFile", "imageio", "cv2", "torchvision.io", "skimage.io")


def opens_an_image(node: ast.AST) -> bool:
    """Whether a node of the syntax tree calls, or imports, something that reads image files."""
    if isinstance(node, ast.Attribute):
        of_pillow = isinstance(node.value, ast.Name) and node.value.id in ("Image", "PIL")
        return node.attr in READERS or (node.attr == "open" and of_pillow)
    if isinstance(node, ast.ImportFrom) and node.module:
        return node.module.startswith(LIBRARIES) or (
            node.module == "PIL.Image" and any(alias.name in ("open", "*") for alias in node.names)
        )
    return isinstance(node, ast.Import) and any(
        alias.name.startswith((*LIBRARIES, "PIL.Image")) for alias in node.names
    )


def test_no_other_place_opens_an_image() -> None:
    """`Image.open`, or another library's reader, is used in pipeline/images.py alone."""
    tops = ("pipeline", "stages", "launchers", "benchmarks", "studies")
    files = [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]
    found = {str(p.relative_to(ROOT)) for p in files if any(map(opens_an_image, ast.walk(ast.parse(p.read_text()))))}
    assert found == {"pipeline/images.py"}
