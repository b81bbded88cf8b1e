"""Name what an exported classifier sees in image files, best class first.

    python -m pipeline.predict EXPORT IMAGE... [--top 5] [--cam FOLDER] [--ground R,G,B] [--max-pixels N]

With --cam it also draws where the evidence for the best class lies (Grad-CAM).
An image that cannot be read gets a sentence, the others are still classified, and the exit code is 3. A command that
makes no sense is 2; an export that is missing or damaged is 4.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline import decoding
from pipeline.classifier import Classifier, load
from pipeline.cli import guarded
from pipeline.errors import ConfigError, DataError, EnvironmentProblem


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder with model.json, of a classifier")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=5, help="how many names for each image (default 5)")
    parser.add_argument("--cam", type=Path, metavar="FOLDER", help="write a Grad-CAM picture of each image there")
    decoding.add_options(parser, "that of the export")
    given = parser.parse_args(arguments)
    if given.top < 1:
        raise ConfigError(f"--top {given.top}: ask for at least one name")
    model = load(given.export, ground=given.ground, max_pixels=given.max_pixels)
    return predict(model, given.images, given.top, given.cam)


def predict(model: Classifier, images: Sequence[Path], top: int, cam: Path | None) -> int:
    """Print one line for each image, in order, as soon as its batch is classified.

    Args:
        model: The classifier.
        images: Image files.
        top: The number of names for each image.
        cam: Folder for the Grad-CAM pictures, or None for no pictures.

    Returns:
        0, or DataError's exit code if an image could not be read.
    """
    if cam is not None:
        try:
            cam.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{cam} cannot be written ({error.strerror}); choose another --cam") from None
    width = max(len(str(path)) for path in images)
    failed: list[str] = []

    def report(source: str, error: DataError) -> None:
        failed.append(source)
        print(f"error: {source}: {error}", file=sys.stderr, flush=True)

    def files() -> Iterator[Path]:
        for path in images:
            if path.is_dir():
                report(str(path), DataError("a folder; give the image files in it, for example FOLDER/*.jpg"))
            else:
                yield path

    predictions = model.stream(files(), top=top, explain=cam is not None, on_error=report)
    for number, prediction in enumerate(predictions):
        print(f"{prediction.source:{width}s}  {prediction.summary}", flush=True)
        if cam is not None and prediction.picture is not None:
            # The number keeps apart files of one name in different folders.
            prediction.picture.save(cam / f"{number:04d}-{Path(prediction.source).stem}.png")
    return DataError.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
