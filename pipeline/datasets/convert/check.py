"""Find every image of a source that cannot be converted, before anything is written."""

import functools
from collections.abc import Mapping

from pipeline.datasets.convert.source import Problem, Source
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.tars import MAX_IMAGE_BYTES
from pipeline.datasets.text import shown
from pipeline.decoding import Decoding
from pipeline.errors import DataError
from pipeline.images import TooLarge, UnreadableImage, decode

_CHUNK = 64  # images in a job


def check_images(source: Source, decoding: Decoding, processes: int, lock: int) -> dict[int, Problem]:
    """Return why images cannot be converted: empty, too large, or not decodable; by their item.

    Items of `source.problems` are not read. Images that are made here need no check.

    Args:
        source: The images.
        decoding: The limit on pixels.
        processes: How many processes decode.
        lock: Descriptor of a lock, which they close.
    """
    if not source.files:
        return {}
    items = [item for item in range(len(source.keys)) if item not in source.problems]
    jobs = [items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK)]
    check = functools.partial(_check_items, source, decoding)
    found: dict[int, Problem] = {}
    for problems in run_parallel(check, jobs, processes, "images checked", [len(job) for job in jobs], [lock]):
        found |= problems
    return found


def refusal(
    source: Source, problems: Mapping[int, Problem], instead: str = "or leave them out with --skip-unreadable"
) -> DataError:
    """Return the error that names all images which cannot be read; `instead` is what to do but repairing them."""
    lines = [problems[item].detail for item in sorted(problems)]
    return DataError(
        "\n  ".join(
            [
                f"{source.name}: {len(lines)} of {len(source.keys)} images cannot be converted, and nothing was written; "
                f"repair or remove them, {instead}:",
                *lines,
            ]
        )
    )


def _check_items(source: Source, decoding: Decoding, items: list[int]) -> dict[int, Problem]:
    problems = {}
    for item in items:
        if problem := _problem(source, decoding, item):
            problems[item] = problem
    return problems


def _problem(source: Source, decoding: Decoding, item: int) -> Problem | None:
    name = shown(source.files[item]) if len(source.files) == len(source.keys) else source.keys[item]
    try:
        _, data = source.read(item)
    except DataError as error:
        return Problem("unreadable", str(error))
    if not data:
        return Problem("empty", f"{name}: the file is empty")
    if len(data) > MAX_IMAGE_BYTES:
        return Problem("too large", f"{name}: {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
    try:
        decode(data, decoding)
    except TooLarge as error:
        return Problem("too large", f"{name}: {error}")
    except UnreadableImage as error:
        return Problem("unreadable", f"{name}: {error}")
    return None
