"""python -m pipeline.predict EXPORT IMAGE... [--top 5] [--cam FOLDER]

Names what an exported classifier sees in image files, best first; with --cam, draws where it looks (Grad-CAM).
An image that cannot be read gets a sentence and the others are still classified: exit code 3 then. A command that makes
no sense is 2, an export that is missing or damaged 4.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError, DataError, EnvironmentProblem, PipelineError
from pipeline.exports.card import Card

BATCH = 32
MAX_BYTES = 512 * 2**20  # a file beyond this is no photograph


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder with model.json, of a classifier")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, help="how many names for each image (default 5)")
    parser.add_argument("--cam", type=Path, metavar="FOLDER", help="write a Grad-CAM picture of each image there")
    given = parser.parse_args(arguments)
    try:
        return predict(given.export, given.images, given.top, given.cam)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def predict(export: Path, images: Sequence[Path], top: int, cam: Path | None) -> int:
    """Prints one line an image; returns 0, or DataError's exit code if some were no images."""
    if top < 1:
        raise ConfigError(f"--top {top}: ask for at least one name")
    card = Card.read(export)
    if card.kind != "classifier":
        raise ConfigError(f"{export} holds a pretrainer, which names no classes; give a classifier's export")
    if cam is not None:
        try:
            cam.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{cam} cannot be written ({error.strerror}); choose another --cam") from None

    import torch

    from pipeline.exports.export import load_export
    from pipeline.streaming.transforms import eval_views

    model, card = load_export(export)
    views = eval_views(card.model.image_size, mean=card.preprocessing.mean, std=card.preprocessing.std)
    width = max(len(str(path)) for path in images)
    failed = False
    for start in range(0, len(images), BATCH):
        paths, tensors = [], []
        for path in images[start : start + BATCH]:
            try:
                tensors.append(views(read_image(path), 0)["images"])
                paths.append(path)
            except DataError as error:
                print(f"error: {path}: {error}", file=sys.stderr, flush=True)
                failed = True
        if not paths:
            continue
        batch = torch.stack(tensors)
        with torch.no_grad():
            shares, classes = model(batch).float().softmax(-1).topk(min(top, len(card.classes)))
        for path, row, names in zip(paths, shares.tolist(), classes.tolist(), strict=True):
            said = "  ".join(f"{card.classes[c]} {100 * share:.1f}%" for c, share in zip(names, row, strict=True))
            print(f"{path!s:{width}s}  {said}", flush=True)
        if cam is not None:
            _draw(model, card, paths, batch, cam, start)
    return DataError.exit_code if failed else 0


def read_image(path: Path) -> bytes:
    """A file's bytes; DataError with the reason if there are none to be had."""
    if path.is_dir():
        raise DataError("a folder; give the image files in it, for example FOLDER/*.jpg")
    try:
        if not path.is_file():
            raise DataError("no such file" if not path.exists() else "not a file with an image in it")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path.stat().st_size / 2**20:.0f} MiB; at most {MAX_BYTES >> 20} are read")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None


def _draw(model: "object", card: Card, paths: Sequence[Path], batch: "object", folder: Path, start: int) -> None:
    import torch
    from PIL import Image

    from pipeline.evaluate.gradcam import gradcam, overlay

    assert isinstance(model, torch.nn.Module)
    assert isinstance(batch, torch.Tensor)
    maps, _ = gradcam(model, batch)
    pictures = overlay(batch, maps, card.preprocessing.mean, card.preprocessing.std)
    for k, (path, picture) in enumerate(zip(paths, pictures, strict=True), start=start):
        pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
        # Two folders may hold files of one name.
        Image.fromarray(pixels).resize((224, 224), Image.Resampling.NEAREST).save(folder / f"{k:04d}-{path.stem}.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
