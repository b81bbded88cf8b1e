"""Open images: the one place where bytes become pixels, as a person sees them in a viewer.

What every caller gets, on the fast path too:

- Formats are recognised by content, never by name. `FORMATS` lists them; anything else is refused, and no other program is
  ever started. (Pillow alone would hand PostScript to Ghostscript.)
- The orientation that EXIF or XMP states is applied, all eight values.
- Transparent pixels are composed on `Decoding.ground`.
- Greyscale of more than 8 bits is scaled by its range (`pipeline.greyscale` says how).
- Of an animation or a file with several pages the first frame is used.
- CMYK and YCCK are converted by Pillow's formula. ICC profiles are not applied.

Limits: an image of more than `Decoding.max_pixels` is refused before its pixels exist. A JPEG is decoded at 1/2, 1/4 or 1/8
scale instead, up to BASELINE times the limit, or PROGRESSIVE times where libjpeg must hold all coefficients in memory.

simplejpeg decodes JPEG where it is installed. It uses the same libjpeg-turbo as Pillow, gives bit-equal pixels, and is
1.25 times as fast (photographs of 500 x 375, one core: 0.81 against 1.01 ms). Its fast flags would gain another 11 %, but
change pixels by 1.9 levels of 255 in the mean, so that pixels would depend on what is installed. They are off.
`python -m benchmarks.data` measures it.
"""

import functools
import importlib.util
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.decoding import DEFAULT, MAX_PIXELS, Decoding
from pipeline.errors import DataError, PipelineError
from pipeline.greyscale import to_8_bits

logger = logging.getLogger(__name__)

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # by Pillow's names
BASELINE, PROGRESSIVE = 16, 2  # how many times the limit a JPEG may have, since it is decoded at a reduced scale
NOTES = {
    "transparent": "with transparent pixels, which are put on a ground of the colour data.ground",
    "reduced": "larger than data.max_pixels, which are decoded at a reduced scale",
    "range": "of grey with more than 8 bits, which are scaled by their range",
}
_JPEG, _PNG, _START_OF_SCAN = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\xda"
_KNOWN = {  # where, what: formats that people give by mistake, for the sentence
    "PostScript": (0, (b"%!PS", b"\xc5\xd0\xd3\xc6")),
    "PDF": (0, (b"%PDF",)),
    "HEIC": (4, (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")),
    "SVG or another text": (0, (b"<",)),
    "JPEG 2000": (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    "JPEG XL": (0, (b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    "Photoshop": (0, (b"8BPS",)),
    "an icon or TGA": (0, (b"\0\0\1\0", b"\0\0\2\0")),
    "a pointer of Git LFS, whose image `git lfs pull` fetches": (0, (b"version https://git-lfs",)),
}

Pixels = NDArray[np.uint8]  # (height, width, 3), RGB
Notes = Counter[str]  # how many images needed what; the keys are those of NOTES
Decoder = Callable[[bytes, Decoding, Notes | None], Pixels]


class UnreadableImage(DataError):
    """The bytes of one sample are no image within the limits. Other samples may be fine."""


class TooLarge(UnreadableImage):
    """The image has more pixels than are decoded. It is not damaged."""


@dataclass(frozen=True)
class Header:
    """What an image file says of itself; its pixels may still be damaged.

    Attributes:
        format: One of FORMATS.
        width: In pixels, before the orientation is applied.
        height: In pixels, before the orientation is applied.
        rgb_profile: The ICC profile, if it describes RGB colours.
    """

    format: str
    width: int
    height: int
    rgb_profile: bytes | None


def decode(data: bytes, decoding: Decoding = DEFAULT, notes: Notes | None = None) -> Pixels:
    """Decode the bytes of an image file to RGB pixels.

    Args:
        data: The whole file.
        decoding: The choices in decoding.
        notes: Counts what was done to the image.

    Raises:
        UnreadableImage: It is no image of FORMATS, is damaged, or is too large (`TooLarge`).
    """
    return choose_decoder()(data, decoding, notes)


@functools.cache
def choose_decoder() -> Decoder:
    """Choose the decoder once per process, and log the choice."""
    if importlib.util.find_spec("simplejpeg") is None:
        logger.info("decoding JPEG with Pillow; simplejpeg is not installed and would be faster")
        return decode_with_pillow
    return decode_with_simplejpeg


def decode_with_simplejpeg(data: bytes, decoding: Decoding = DEFAULT, notes: Notes | None = None) -> Pixels:
    """Decode JPEG with simplejpeg, and with Pillow the rest: CMYK, PNG, large and partly damaged files."""
    import simplejpeg

    if not data.startswith(_JPEG):
        return decode_with_pillow(data, decoding, notes)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if not 0 < width * height <= decoding.max_pixels or colours in ("CMYK", "YCCK"):
            return decode_with_pillow(data, decoding, notes)
        pixels: Pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return decode_with_pillow(data, decoding, notes)
    header = _before_scan(data)
    if b"Exif\0\0" not in header and b"tiff:Orientation" not in header:  # Pillow reads them slowly
        return pixels
    try:
        with _only_refusals():
            orientation = _orientation(_open(data))
    except UnreadableImage:
        return pixels
    return _turn_upright(pixels, orientation)


def decode_with_pillow(data: bytes, decoding: Decoding = DEFAULT, notes: Notes | None = None) -> Pixels:
    """Decode any image of FORMATS."""
    try:
        image = _load(data, decoding, notes)
    except UnreadableImage:
        bare = _without_text(data)
        if bare == data:
            raise
        image = _load(bare, decoding, notes)
    return to_pixels(image, decoding, notes)


def to_pixels(image: Image.Image, decoding: Decoding = DEFAULT, notes: Notes | None = None) -> Pixels:
    """Convert a Pillow image of any mode to upright RGB pixels.

    Args:
        image: Its current frame is used.
        decoding: The choices in decoding.
        notes: Counts what was done to the image.

    Raises:
        UnreadableImage: Its file is damaged.
    """
    notes = Counter() if notes is None else notes
    with _only_refusals():
        _load_pixels(image)
        orientation = _orientation(image)
    if image.mode[0] in "IF":
        notes["range"] += 1
        image = to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = _compose(image, decoding.ground, notes)
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return _turn_upright(pixels, orientation)


def read_header(data: bytes) -> Header:
    """Read what an image file says of itself.

    Raises:
        UnreadableImage: It is no image of FORMATS.
    """
    with _only_refusals():
        try:
            image = _open(data)
        except ValueError:
            image = _open(_without_text(data))
        profile = image.info.get("icc_profile")
        rgb = profile if isinstance(profile, bytes) and profile[16:20] == b"RGB " else None
        return Header(image.format or "", image.width, image.height, rgb)


def _open(data: bytes) -> Image.Image:
    """Open a file; only its header is read."""
    if data.startswith(
        _JPEG
    ):  # without Pillow's own limit on pixels, since it may be reduced; also the first image of MPO
        return JpegImageFile(io.BytesIO(data))
    if not data:
        raise UnreadableImage("not a readable image (it is empty)")
    kind = next((k for k, (at, starts) in _KNOWN.items() if data[at:].startswith(starts)), None)
    if kind is not None:
        raise UnreadableImage(f"not a readable image: its content is {kind}; accepted are {', '.join(FORMATS)}")
    return Image.open(io.BytesIO(data), formats=_readers())


@functools.cache
def _readers() -> tuple[str, ...]:
    """Return Pillow's readers of FORMATS; a build of Pillow may lack some. MPO is read by JPEG's."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _only_refusals(limit: int = MAX_PIXELS) -> Iterator[None]:
    """Turn everything that Pillow raises into UnreadableImage. On hostile bytes its readers raise nearly any exception."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd metadata, which does not concern the pixels
            yield
    except PipelineError:
        raise
    except UnidentifiedImageError:  # its text names an object in memory
        raise UnreadableImage("not a readable image (unknown format)") from None
    except Image.DecompressionBombError as error:
        number = re.search(r"\d+", str(error))
        raise _too_large(f"{int(number[0]) if number else 0:,} pixels", limit) from None
    except MemoryError:
        raise UnreadableImage("not a readable image (it does not fit into the memory)") from None
    except Exception as error:
        raise UnreadableImage(f"not a readable image ({type(error).__name__}: {error})") from None


def _load(data: bytes, decoding: Decoding, notes: Notes | None) -> Image.Image:
    """Open a file, check its size, and decode it at a scale within the limit."""
    limit = decoding.max_pixels
    with _only_refusals(limit):
        image = _open(data)
        width, height = image.width, image.height
        if width < 1 or height < 1:
            raise UnreadableImage(f"not a readable image: it has {width} x {height} pixels")
        if width * height > limit:
            most = 0
            if isinstance(image, JpegImageFile):
                most = limit * (PROGRESSIVE if _holds_coefficients(image, data) else BASELINE)
            if width * height > most:
                raise _too_large(f"{width} x {height} pixels", limit)
            scale = next(s for s in (2, 4, 8) if -(-width // s) * -(-height // s) <= limit)
            image.draft(None, (width // scale, height // scale))
            if notes is not None:
                notes["reduced"] += 1
        _load_pixels(image)
        return image


def _load_pixels(image: Image.Image) -> None:
    """Load the pixels; of 16 bits a channel Pillow keeps 8, and the colour that a PNG calls transparent must follow."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and any(str(tile[3]).endswith(";16B") for tile in getattr(image, "tile", ())):
        image.info["transparency"] = tuple(level >> 8 for level in colour)
    image.load()


def _too_large(what: str, limit: int) -> TooLarge:
    return TooLarge(
        f"{what}; at most {limit:,} are decoded: make the image smaller or save it as a baseline JPEG, which is read at a reduced"
        " scale; data.max_pixels raises the limit in a stage, --max-pixels in other commands"
    )


def _holds_coefficients(image: JpegImageFile, data: bytes) -> bool:
    """Whether libjpeg keeps the coefficients of the whole image: it is progressive, or its components come one by one."""
    components = len(image.getbands())
    segment = 6 + 2 * components  # bytes of the start of a scan that holds all components
    end = image.fp.tell() if image.fp else 0  # Pillow stops after this segment
    start = data[end - segment : end - segment + 3]
    return "progressive" in image.info or start != bytes((0, segment, components))


def _before_scan(data: bytes) -> bytes:
    """Return a JPEG's segments before its pixels; the whole of a file whose segments do not follow one another."""
    at = 2
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == _START_OF_SCAN:
            return data[:at]
        if marker < b"\xc0" or b"\xd0" <= marker <= b"\xd9" or marker == b"\xff":  # has no length, or is none
            break
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return data


def _without_text(data: bytes) -> bytes:
    """Return a PNG without its texts and its ICC profile, which Pillow refuses above a limit; other data as they are."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _orientation(image: Image.Image) -> int:
    """Return the orientation that EXIF or XMP states, 1 (upright) to 8."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata says nothing about the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p[::-1].transpose(1, 0, 2),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p[:, ::-1].transpose(1, 0, 2),
}


def _turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    turned = _TURNS[orientation](pixels)
    upright = np.empty(turned.shape, np.uint8)
    for channel in range(3):  # numpy copies a channel of strided pixels three times as fast as all at once
        upright[..., channel] = turned[..., channel]
    return upright


def _compose(image: Image.Image, ground: tuple[int, int, int], notes: Notes) -> Image.Image:
    """Compose an image on a ground, if any pixel is not opaque."""
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image
    notes["transparent"] += 1
    composed = Image.new("RGB", image.size, ground)
    composed.paste(image, mask=alpha)
    return composed
