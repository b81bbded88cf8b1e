"""Make image folders of glyphs and icons from the fonts and icon themes that this machine has.

    python -m studies.glyphs glyphs data/pictures/glyphs [--classes 100] [--variants 1] [--fonts FOLDER ...]
    python -m studies.glyphs icons data/pictures/icons [--themes FOLDER ...]

Glyphs: a class is a character, an image is that character in one face, black on white. Faces come from fontconfig's folders
and from matplotlib. On Debian more are one command away, for example `apt-get install fonts-liberation fonts-lato
fonts-freefont-ttf fonts-roboto`. Characters that look alike in a plain face, such as the Latin and the Cyrillic A, are one
class. A face that lacks a character has no image of it.

Icons: a class is the folder that the theme's author put the icon into, such as actions, devices or status. An icon that a
theme has in several sizes is one image. Symbolic icons, of one colour, are kept apart by their name and count too.

A quarter of each class is the test set. The folders are train/CLASS/*.png and test/CLASS/*.png. The same files on the machine
give the same images; the command writes which files it used to sources.txt.
"""

import argparse
import hashlib
import io
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline import seeds
from pipeline.cli import guarded
from pipeline.errors import DataError
from pipeline.images import decode, read_header

SIDE = 28  # pixels
DRAWN = 4 * SIDE  # glyphs are drawn large and then reduced
TEST_SHARE = 0.25
FONTS = (
    Path("/usr/share/fonts"),
    Path("/usr/local/share/fonts"),
    Path.home() / ".fonts",
    Path.home() / ".local/share/fonts",
)
THEMES = (Path("/usr/share/icons"), Path("/usr/local/share/icons"))
# Characters in the order in which they become classes: digits, Latin, Greek, Cyrillic, signs, then the Latin of Europe.
RANGES = ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0x391, 0x3A9), (0x3B1, 0x3C9), (0x410, 0x44F), (0x21, 0x2F),
          (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0xA1, 0xFF), (0x100, 0x17F), (0x2190, 0x2199), (0x2200, 0x2265))  # fmt: skip
PLAIN = "DejaVu Sans Book"  # the face that characters are compared in, if it is there
LEAST_FACES = 8  # a character that fewer faces have is no class
LIKE = 0.2  # two characters look alike whose difference has less than this share of the ink of both
CONTEXTS = ("actions", "animations", "apps", "applications", "categories", "devices", "emblems", "emotes", "intl", "mimetypes",
            "places", "status", "ui")  # fmt: skip
ICON_SIDE = 48
_GLYPHS, _TEST = 41, 42  # streams of random numbers


class Face(NamedTuple):
    """A face of a font: its name, its file, and how it draws at the size of the images."""

    name: str
    file: Path
    font: ImageFont.FreeTypeFont


def faces(folders: Iterable[Path]) -> list[Face]:
    """Find the faces of the fonts in some folders, each name once, sorted by name; files that are no font are left out."""
    found: dict[str, Face] = {}
    files = {file for folder in folders for kind in ("ttf", "otf") for file in folder.rglob(f"*.{kind}")}
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        try:
            font = ImageFont.truetype(str(file), round(0.72 * DRAWN))
            name = " ".join(part for part in font.getname() if part)
        except (OSError, ValueError):
            continue
        found.setdefault(name, Face(name, file, font))
    return [found[name] for name in sorted(found)]


def matplotlib_fonts() -> Path:
    """Return the folder of the faces that matplotlib carries."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def draw_glyph(face: Face, letter: str, rng: random.Random | None = None) -> Image.Image | None:
    """Draw a character, black on white.

    Args:
        face: The face.
        letter: The character.
        rng: Moves, turns and scales the character a little; None = neither.

    Returns:
        A grey image of SIDE x SIDE pixels, or None if the face does not have the character.
    """
    box = face.font.getmask(letter).getbbox()
    if box is None or bytes(face.font.getmask(letter)) == bytes(face.font.getmask("\U000fffff")):
        return None  # nothing is drawn, or the box that stands for a missing character
    canvas = Image.new("L", (DRAWN, DRAWN), 255)
    try:
        ImageDraw.Draw(canvas).text((DRAWN // 2, round(0.76 * DRAWN)), letter, fill=0, font=face.font, anchor="ms")
    except ValueError:
        return None
    if rng is not None:
        scale, angle = rng.uniform(0.85, 1.1), rng.uniform(-8, 8)
        moved = [rng.uniform(-0.08, 0.08) * DRAWN for _ in range(2)]
        canvas = canvas.rotate(
            angle, Image.Resampling.BICUBIC, translate=(round(moved[0]), round(moved[1])), fillcolor=255
        )
        side, shift = DRAWN / scale, (DRAWN - DRAWN / scale) / 2
        canvas = canvas.transform((DRAWN, DRAWN), Image.Transform.EXTENT, (shift, shift, shift + side, shift + side),
                                  Image.Resampling.BICUBIC, fillcolor=255)  # fmt: skip
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def write_glyphs(out: Path, known: Sequence[Face], *, classes: int, variants: int, seed: int) -> int:
    """Write an image folder of glyphs.

    Args:
        out: The folder.
        known: Faces to draw with.
        classes: Number of classes, fewer if the faces have fewer characters.
        variants: Images of each face and character; from two on, each is moved, turned and scaled a little.
        seed: Seed of the variants and of the choice of test images.

    Returns:
        The number of classes written.

    Raises:
        DataError: There are fewer than LEAST_FACES faces.
    """
    if len(known) < LEAST_FACES:
        raise DataError(
            f"only {len(known)} faces were found, and {LEAST_FACES} are needed; install a font package, for example"
            " apt-get install fonts-liberation, or name folders with --fonts"
        )
    chosen: list[str] = []
    plain: list[np.ndarray] = []
    pictures: dict[str, list[tuple[str, bytes]]] = {}
    for code in (code for low, high in RANGES for code in range(low, high + 1)):
        if len(chosen) == classes:
            break
        drawn = [(face.name, picture) for face in known if (picture := draw_glyph(face, chr(code)))]
        if len(drawn) < LEAST_FACES:
            continue
        shown = dict(drawn)
        look = 1 - np.asarray(shown.get(PLAIN, drawn[len(drawn) // 2][1]), np.float64) / 255
        if any(2 * np.abs(look - other).sum() < LIKE * (look + other).sum() for other in plain):
            continue
        plain.append(look)
        chosen.append(chr(code))
        if variants > 1:
            by_name = {face.name: face for face in known}
            drawn = [
                (f"{name} {k}", picture)
                for name, _ in drawn
                for k in range(variants)
                if (picture := draw_glyph(by_name[name], chr(code), _random(seed, code, name, k)))
            ]
        pictures[f"U+{code:04X}"] = [(title, _png(picture)) for title, picture in drawn]
    _write(out, pictures, seed)
    (out / "sources.txt").write_text("".join(f"{face.name}\t{face.file}\n" for face in known))
    return len(chosen)


def icons(themes: Iterable[Path]) -> dict[str, list[Path]]:
    """Find the icons of themes: class -> for each icon of each theme the file nearest above ICON_SIDE, or the largest."""
    best: dict[tuple[str, str, str], tuple[tuple[bool, int], Path]] = {}
    for root in themes:
        for file in sorted(root.rglob("*.png")):
            parts = file.relative_to(root).parts
            context = next((part for part in parts[1:-1] if part in CONTEXTS), None)
            if context is None or file.is_symlink():
                continue
            side = _side(file)
            rank = (side < ICON_SIDE, abs(side - ICON_SIDE))
            key = (context.replace("applications", "apps"), parts[0], file.stem)
            if side >= 16 and (key not in best or rank < best[key][0]):
                best[key] = (rank, file)
    found: dict[str, list[Path]] = {}
    for (context, _, _), (_, file) in sorted(best.items()):
        found.setdefault(context, []).append(file)
    return found


def write_icons(out: Path, themes: Sequence[Path], *, least: int, seed: int) -> int:
    """Write an image folder of icons, with their transparency.

    Args:
        out: The folder.
        themes: Folders of icon themes.
        least: A class with fewer icons is left out.
        seed: Seed of the choice of test images.

    Returns:
        The number of classes written.

    Raises:
        DataError: There are fewer than two classes.
    """
    pictures, used = {}, []
    for name, files in icons(themes).items():
        seen: dict[str, tuple[str, bytes]] = {}
        for file in files:
            data = file.read_bytes()
            digest = hashlib.sha256(decode(data).tobytes()).hexdigest()  # themes copy icons from one another
            seen.setdefault(digest, (file.stem, data))
        if len(seen) >= least:
            pictures[name] = list(seen.values())
            used += files
    if len(pictures) < 2:
        raise DataError(
            f"only {len(pictures)} classes have {least} icons or more in {', '.join(map(str, themes))}; install an icon theme,"
            " for example apt-get install adwaita-icon-theme, or name folders with --themes"
        )
    _write(out, pictures, seed)
    (out / "sources.txt").write_text("".join(f"{file}\n" for file in used))
    return len(pictures)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _write(out: Path, pictures: dict[str, list[tuple[str, bytes]]], seed: int) -> None:
    for label, (name, drawn) in enumerate(pictures.items()):
        order = np.asarray(seeds.permutation(len(drawn), seed, label, _TEST))
        tested = set(order[: max(1, round(TEST_SHARE * len(drawn)))].tolist())
        for subset in ("train", "test"):
            (out / subset / name).mkdir(parents=True, exist_ok=True)
        for k, (title, data) in enumerate(drawn):
            stem = "".join(c if c.isalnum() else "-" for c in title)
            (out / ("test" if k in tested else "train") / name / f"{k:04d}-{stem[:60]}.png").write_bytes(data)


def _side(file: Path) -> int:
    """Shorter side of an image in pixels; 0 if it is none."""
    try:
        header = read_header(file.read_bytes())
    except (OSError, DataError):
        return 0
    return min(header.width, header.height)


def _random(seed: int, code: int, name: str, variant: int) -> random.Random:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return random.Random(seeds.fold(seed, code, number, variant, _GLYPHS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m studies.glyphs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["glyphs", "icons"])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write train/ and test/ into")
    parser.add_argument(
        "--classes", type=int, default=100, help="characters (default 100; several hundred are possible)"
    )
    parser.add_argument("--variants", type=int, default=1, help="images of a character in a face (default 1)")
    parser.add_argument(
        "--fonts", type=Path, nargs="+", metavar="FOLDER", help="folders of fonts, in place of this machine's"
    )
    parser.add_argument("--themes", type=Path, nargs="+", metavar="FOLDER", help="folders of icon themes")
    parser.add_argument("--least", type=int, default=24, help="least icons of a class (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default 0)")
    given = parser.parse_args(arguments)
    if (given.out / "sources.txt").is_file():
        print(f"{given.out}: already there")
        return 0
    if given.kind == "glyphs":
        folders = given.fonts or [*FONTS, matplotlib_fonts()]
        written = write_glyphs(
            given.out, faces(folders), classes=given.classes, variants=given.variants, seed=given.seed
        )
    else:
        written = write_icons(given.out, given.themes or list(THEMES), least=given.least, seed=given.seed)
    print(
        f"{given.out}: {written} classes, {_number(given.out / 'train')} train and {_number(given.out / 'test')} test images"
    )
    return 0


def _number(folder: Path) -> int:
    return sum(1 for _ in _images(folder))


def _images(folder: Path) -> Iterator[Path]:
    return folder.rglob("*.png")


if __name__ == "__main__":
    sys.exit(main())
