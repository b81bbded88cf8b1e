"""Images that become something else or nothing on their way into a dataset, without a word: there must be none.

The corpus is one drawing, black on white, in every format and disguise that people have, and files that are no image. It is
converted as a folder of classes, as tars, and as a table. Each file must be a sample that shows the drawing with the right
label, or the output must name it.
"""

import contextlib
import io
import os
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from pipeline.data import main
from pipeline.datasets.manifest import read_image, read_manifest
from pipeline.images import decode

WIDTH, HEIGHT = 48, 32
TOLERANCE = 6  # levels of 255 in the mean; JPEG changes the edges of the drawing
ORIENTATION = 0x0112
_STORED = {  # how a picture is stored that a viewer turns upright (EXIF 2.3, table 6)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    ' xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@dataclass(frozen=True)
class Entry:
    """A file of the corpus.

    Attributes:
        name: Its name in the folder of its class, as the file system has it.
        data: Its bytes.
        shows: Whether it shows the drawing.
    """

    name: str
    data: bytes
    shows: bool = True

    @property
    def printed(self) -> str:
        """Its name as messages print it."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")


def drawing() -> Image.Image:
    """Return the drawing: no turn and no mirror image of it is equal to it, and both colours are common."""
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    draw = ImageDraw.Draw(image)
    draw.rectangle((4, 4, 30, 12), fill=0)
    draw.rectangle((4, 4, 10, 27), fill=0)
    draw.rectangle((36, 20, 43, 27), fill=0)
    return image


def corpus() -> list[Entry]:
    """Return the files of the corpus."""
    found = [*_formats(), *_deep(), *_transparent(), *_turned(), *_several_frames(), *_names()]
    return [*found, *(Entry(name, data, False) for name, data in _no_images().items())]


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _formats() -> Iterator[Entry]:
    grey, rgb = drawing(), drawing().convert("RGB")
    fine = {"quality": 95}
    for name, image, kind, options in (
        ("baseline.jpg", rgb, "JPEG", fine),
        ("progressive.jpg", rgb, "JPEG", {"progressive": True, **fine}),
        ("grey.jpeg", grey, "JPEG", fine),
        ("cmyk.JPG", rgb.convert("CMYK"), "JPEG", fine),
        ("without a colour transform.jfif", rgb, "JPEG", {"keep_rgb": True, **fine}),
        ("colours.png", rgb, "PNG", {}),
        ("palette.png", rgb.quantize(2), "PNG", {}),
        ("one bit.png", grey.convert("1"), "PNG", {}),
        ("lossy.webp", rgb, "WEBP", fine),
        ("lossless.webp", rgb, "WEBP", {"lossless": True}),
        ("palette.gif", rgb.quantize(2), "GIF", {}),
        ("colours.bmp", rgb, "BMP", {}),
        ("palette.dib", rgb.quantize(2), "BMP", {}),
        ("plain.tif", rgb, "TIFF", {}),
        ("lzw.tiff", rgb, "TIFF", {"compression": "tiff_lzw"}),
        ("fax.tiff", grey.convert("1"), "TIFF", {"compression": "group4"}),
        ("cmyk.tiff", rgb.convert("CMYK"), "TIFF", {}),
        ("colours.ppm", rgb, "PPM", {}),
        ("grey.pgm", grey, "PPM", {}),
        ("bits.pbm", grey.convert("1"), "PPM", {}),
        ("colours.avif", rgb, "AVIF", fine),
    ):
        yield Entry(name, _encode(image, kind, **options))
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 3_000_000)
    yield Entry("large text.png", _encode(rgb, "PNG", pnginfo=text))


def _deep() -> Iterator[Entry]:
    levels = np.asarray(drawing())
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    yield Entry("16 bits.png", _encode(deep, "PNG"))
    yield Entry("16 bits.tiff", _encode(deep, "TIFF"))
    plain = _encode(Image.fromarray(65535 - levels.astype(np.uint16) * 257), "TIFF")
    black, white = (struct.pack("<HHIHH", 262, 3, 1, photometric, 0) for photometric in (1, 0))
    yield Entry("16 bits, white is zero.tiff", plain.replace(black, white))
    yield Entry("floats.tiff", _encode(Image.fromarray(levels.astype(np.float32) / 255), "TIFF"))
    yield Entry("large floats.tiff", _encode(Image.fromarray(levels.astype(np.float32) * 1e6 - 1e6), "TIFF"))
    yield Entry("32 bits.tiff", _encode(Image.fromarray(levels.astype(np.int32) * 1000), "TIFF"))


def _transparent() -> Iterator[Entry]:
    cut = Image.merge("LA", (Image.new("L", (WIDTH, HEIGHT), 0), drawing().point(lambda level: 255 - level)))
    for name, image, kind, options in (
        ("cut out.png", cut.convert("RGBA"), "PNG", {}),
        ("cut out, grey.png", cut, "PNG", {}),
        ("cut out, palette.png", cut.convert("RGBA").quantize(4), "PNG", {}),
        ("cut out.webp", cut.convert("RGBA"), "WEBP", {"lossless": True}),
        ("cut out.gif", cut.convert("RGBA"), "GIF", {}),
        ("cut out.tiff", cut.convert("RGBA"), "TIFF", {}),
        ("cut out.avif", cut.convert("RGBA"), "AVIF", {"quality": 95}),
        ("one colour is none.png", drawing().point(lambda level: 7 if level else 0), "PNG", {"transparency": 7}),
    ):
        yield Entry(name, _encode(image, kind, **options))


def _turned() -> Iterator[Entry]:
    upright = drawing().convert("RGB")
    for orientation, turn in _STORED.items():
        for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            data = _encode(upright.transpose(turn), kind, exif=exif, quality=95)
            yield Entry(f"turned, {kind} {orientation}.{ending}", data)
    yield Entry("turned, XMP.jpg", _encode(upright.transpose(_STORED[6]), "JPEG", quality=95, xmp=_XMP.encode()))


def _several_frames() -> Iterator[Entry]:
    first, black = drawing().convert("RGB"), Image.new("RGB", (WIDTH, HEIGHT))
    for kind, ending in (("GIF", "gif"), ("WEBP", "webp"), ("PNG", "apng"), ("TIFF", "tiff"), ("MPO", "mpo")):
        options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "MPO" else {}
        yield Entry(f"frames.{ending}", _encode(first, kind, save_all=True, append_images=[black], **options))


def _names() -> Iterator[Entry]:
    rgb = drawing().convert("RGB")
    jpeg, png = _encode(rgb, "JPEG", quality=95), _encode(rgb, "PNG")
    yield Entry("a PNG.jpg", png)
    yield Entry("no ending", jpeg)
    yield Entry("v1.2 final (copy).jpg", jpeg)
    yield Entry("IMG_1.jpg?width=800", jpeg)
    yield Entry("\u96ea \U0001f431.jpg", jpeg)
    yield Entry("e\u0301te\u0301.jpg", jpeg)
    yield Entry(os.fsdecode(b"caf\xe9.jpg"), jpeg)
    yield Entry("two\nlines.jpg", jpeg)
    yield Entry("deeper/1.jpg", jpeg)


def _no_images() -> dict[str, bytes]:
    jpeg = _encode(drawing().convert("RGB"), "JPEG", quality=95)
    return {
        "empty.jpg": b"",
        "cut off.jpg": jpeg[: len(jpeg) // 2],
        "zeros.jpg": bytes(2000),
        "web page.jpg": b"<!doctype html><title>404</title>",
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64),
        "phone, renamed.jpg": b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64),
        "scan.jp2": _encode(drawing().convert("RGB"), "JPEG2000"),
        "vectors.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "layers.psd": b"8BPS\0\1" + bytes(64),
    }


def silent_losses(folder: Path) -> list[str]:
    """Convert the corpus in three ways, and return the files that became something else or nothing without a word.

    Args:
        folder: An empty folder for the corpus and the datasets.
    """
    entries = corpus()
    for label in ("cat", "dog"):
        for entry in entries:
            path = folder / "photos" / label / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.data)
    listable = [entry for entry in entries if entry.printed.isprintable() and entry.printed == entry.name]
    _write_tar(folder / "tars", listable)
    rows = "".join(f'"{label}/{entry.name}",{label}\n' for label in ("cat", "dog") for entry in listable)
    (folder / "table.csv").write_text("file,kind\n" + rows)
    ways: dict[str, tuple[list[Entry], Path, list[str]]] = {
        "folder": (entries, folder / "of-folder", ["imagefolder", str(folder / "photos")]),
        "tars": (listable, folder / "tars", ["tars", str(folder / "tars"), "--label-key", "cls"]),
        "table": (
            listable,
            folder / "of-table",
            ["csv", str(folder / "table.csv"), "--root", str(folder / "photos"), "--image", "file", "--label", "kind"],
        ),
    }
    found = []
    for way, (given, out, command) in ways.items():
        words = ["convert", *command, "--processes", "1", *([] if way == "tars" else ["--out", str(out)])]
        code, text = _run(words)
        if code != 3:
            found.append(f"{way}: exit code {code} though files cannot be read")
        found += [f"{way}: {name} is not named" for name in unnamed(given, text)]
        code, _ = _run([*words, "--skip-unreadable"])
        found += (
            [f"{way}: {name}" for name in changed_or_lost(given, out)] if code == 0 else [f"{way}: exit code {code}"]
        )
    return found


def _run(words: list[str]) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = main(words)
    return code, text.getvalue()


def unnamed(entries: list[Entry], text: str) -> list[str]:
    """Return the names of the files that are no image and that a text does not name."""
    return [entry.printed for entry in entries if not entry.shows and entry.printed not in text]


def changed_or_lost(entries: list[Entry], dataset: Path) -> list[str]:
    """Return the entries that are not twice in a dataset, once with each label, as the drawing."""
    manifest, truth = read_manifest(dataset), np.asarray(drawing().convert("RGB")).astype(int)
    right = 0
    wrong = []
    for sample_index in range(manifest.num_samples):
        pixels = decode(read_image(manifest, sample_index))
        label = manifest.classes[manifest.labels[sample_index]]
        same = pixels.shape == truth.shape and float(np.abs(pixels - truth).mean()) < TOLERANCE
        if same and manifest.key(sample_index).startswith(label):
            right += 1
        else:
            wrong.append(f"{manifest.member(sample_index)} shows something else or has another label")
    missing = 2 * sum(entry.shows for entry in entries) - right - len(wrong)
    return wrong + (["an image is missing"] * missing)


def _write_tar(folder: Path, entries: list[Entry]) -> None:
    """Write the entries as WebDataset samples; a key has no dot, and the ending of the file stays."""
    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as file:
        for label in ("cat", "dog"):
            for number, entry in enumerate(entries):
                _, dot, ending = entry.name.rpartition(".")
                key = f"{label}/{number:03d}"
                name = f"{label}/{entry.name}" if not entry.shows else f"{key}.{ending if dot else 'image'}"
                stem = name.rpartition(".")[0]
                for member, data in ((name, entry.data), (f"{stem}.cls", label.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
