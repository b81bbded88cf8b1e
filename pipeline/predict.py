"""Name what an exported classifier sees in image files, best class first.

    python -m pipeline.predict EXPORT IMAGE... [--csv FILE.csv] [--top 5] [--batch 32] [--cam FOLDER]
                               [--ground R,G,B] [--max-pixels N]

IMAGE is an image file, a folder (all images below it), or a pattern in quotes ("photos/**/*.jpg"). The order is that of
the command line; images of a folder or a pattern are sorted by path. With --csv the results go into a table, which is
written whole when all images are classified, and are not printed. With --cam it also draws where the evidence for the
best class lies (Grad-CAM).
An image that cannot be read gets a sentence, the others are still classified, and the exit code is 3. A command that
makes no sense is 2; an export that is missing or damaged is 4.
"""

import argparse
import contextlib
import csv
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import decoding
from pipeline.classifier import BATCH, Classifier, Prediction, files_of, load
from pipeline.cli import guarded
from pipeline.datasets.convert.source import LeftOut
from pipeline.datasets.text import shown
from pipeline.errors import ConfigError, DataError, EnvironmentProblem
from pipeline.files import replacing

BAR_AFTER_SECONDS = 2.0  # a shorter command needs no bar
NAMED = 5  # unreadable images that the last line names again


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder with model.json, of a classifier")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, folder or pattern")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="write one row for each image there")
    parser.add_argument("--top", type=int, default=5, help="how many names for each image (default 5)")
    parser.add_argument(
        "--batch", type=int, default=BATCH, help=f"images that the model sees at once (default {BATCH})"
    )
    parser.add_argument("--cam", type=Path, metavar="FOLDER", help="write a Grad-CAM picture of each image there")
    decoding.add_options(parser, "that of the export")
    given = parser.parse_args(arguments)
    if given.top < 1:
        raise ConfigError(f"--top {given.top}: ask for at least one name")
    if given.batch < 1:
        raise ConfigError(f"--batch {given.batch}: give at least one image")
    if given.csv is not None and (given.csv.suffix.lower() != ".csv" or given.csv.is_dir()):
        # Any other name may be an image that was meant as one, and would be overwritten.
        raise ConfigError(f"--csv {given.csv}: give the name of a file that ends in .csv")
    model = load(given.export, ground=given.ground, max_pixels=given.max_pixels)
    return predict(model, given.images, top=given.top, batch=given.batch, table=given.csv, cam=given.cam)


def predict(
    model: Classifier,
    images: Sequence[str],
    *,
    top: int = 5,
    batch: int = BATCH,
    table: Path | None = None,
    cam: Path | None = None,
) -> int:
    """Print one line for each image, in order, as soon as its batch is classified, or write a table.

    Args:
        model: The classifier.
        images: Image files, folders and patterns.
        top: The number of names for each image.
        batch: The number of images that the model sees at once.
        table: CSV file for the results, or None to print them.
        cam: Folder for the Grad-CAM pictures, or None for no pictures.

    Returns:
        0, or DataError's exit code if an image could not be read.

    Raises:
        EnvironmentProblem: If `table` or `cam` cannot be written.
    """
    if cam is not None:
        try:
            cam.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{cam} cannot be written ({error.strerror}); choose another --cam") from None
    failed: list[str] = []
    left_out: LeftOut = {}

    def report(source: str, error: DataError) -> None:
        failed.append(source)
        bar.clear()
        told = str(error) if str(error).startswith(f"{source} ") else f"{shown(source)}: {error}"
        print(f"error: {told}", file=sys.stderr, flush=True)
        bar.update()

    bar = _bar(beside_lines=table is None and sys.stdout.isatty())
    files: list[Path] = []
    for given in images:
        try:
            files += files_of(given, left_out)
        except DataError as error:
            report(given, error)
    bar.reset(len(files))
    done = 0
    with bar, _output(files, table, min(top, len(model.classes))) as write:
        for prediction in model.stream(files, top=top, explain=cam is not None, on_error=report, batch=batch):
            write(prediction)
            if cam is not None and prediction.picture is not None:
                # The number keeps apart files of one name in different folders.
                prediction.picture.save(cam / f"{done:04d}-{Path(prediction.source).stem}.png")
            done += 1
            bar.update()
    if table is not None or failed:
        print(_summary(done, failed, left_out, table), file=sys.stderr, flush=True)
    return DataError.exit_code if failed else 0


def _bar(*, beside_lines: bool) -> Any:
    """A bar with counts and the time left on a terminal, unless the results are printed there too."""
    from tqdm import tqdm

    hidden = beside_lines or not sys.stderr.isatty()
    return tqdm(unit="image", desc="predict", delay=BAR_AFTER_SECONDS, disable=hidden, dynamic_ncols=True)


@contextlib.contextmanager
def _output(files: Sequence[Path], table: Path | None, top: int) -> Iterator[Callable[[Prediction], None]]:
    """Give the block a function that prints a prediction or writes it into the table."""
    if table is None:
        width = max((len(shown(str(path))) for path in files), default=0)
        yield lambda p: print(f"{shown(p.source):{width}s}  {p.summary}", flush=True)
        return
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(replacing(table))
            file = stack.enter_context(temporary.open("w", newline="", encoding="utf-8"))
        except OSError as error:
            raise EnvironmentProblem(f"{table} cannot be written ({error.strerror}); choose another --csv") from None
        rows = csv.writer(file, lineterminator="\n")
        more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "probability")]
        rows.writerow(["file", "class", "probability", *more])

        def write(p: Prediction) -> None:
            best = zip(p.names, (f"{probability:.6f}" for probability in p.probabilities), strict=True)
            rows.writerow([shown(p.source), *itertools.chain.from_iterable(best)])

        yield write


def _summary(done: int, failed: Sequence[str], left_out: LeftOut, table: Path | None) -> str:
    parts = [f"classified {done} images" + (f", see {table}" if table else "")]
    if failed:
        named = ", ".join(shown(source) for source in failed[:NAMED]) + (", ..." if len(failed) > NAMED else "")
        parts.append(f"{len(failed)} could not be read: {named}")
    parts += [f"{len(names)} other files in the folders: {reason}" for reason, names in sorted(left_out.items())]
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
