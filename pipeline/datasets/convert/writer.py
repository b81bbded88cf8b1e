"""Conversion of a source into shards and a manifest: checked first, in parallel, and continued where it was stopped.

Shards are written by webdataset's TarWriter, so every WebDataset reader opens them. A sample is an image and, where it is
known, its class number (`cls`). A shard has its final name only when it is whole, and a second call keeps whole shards.
`convert.json` beside the shards says what they are made of; the same source elsewhere gives the same bytes.
"""

import contextlib
import errno
import functools
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline import seeds
from pipeline.datasets.convert.check import check_images, refusal
from pipeline.datasets.convert.lock import converting
from pipeline.datasets.convert.progress import Progress, content_digest, plan_digest, shard_digests
from pipeline.datasets.convert.source import Source
from pipeline.datasets.convert.table import table
from pipeline.datasets.manifest import HEADER, Manifest, ShardIndex, read_manifest, write_manifest
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.places import keep_names
from pipeline.datasets.tars import scan_shard
from pipeline.datasets.text import storable
from pipeline.decoding import DEFAULT, Decoding
from pipeline.errors import DataError
from pipeline.files import replacing
from pipeline.images import UnreadableImage, decode, read_header

SAMPLES_PER_SHARD = 2_000
_SHUFFLE = 21  # stream of random numbers


class _Options(NamedTuple):
    """What the bytes of a conversion depend on beside its source; the names are those of `convert`."""

    seed: int
    samples_per_shard: int
    shorter_side: int
    decoding: Decoding


class Converted(NamedTuple):
    """A finished conversion: the dataset, whether it was there already, and the table of what was found."""

    manifest: Manifest
    existed: bool
    table: list[str]


def convert(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shorter_side: int = 0,
    processes: int = 1,
    skip_unreadable: bool = False,
    decoding: Decoding = DEFAULT,
) -> Converted:
    """Write the dataset of `source` to `out`, unless it is there already.

    Args:
        source: The images.
        out: Folder of the dataset.
        seed: Seed of the shuffle over the shards; a source that is slow in another order is not shuffled.
        samples_per_shard: Images in each shard; the last one may hold fewer.
        shorter_side: Reduce larger images to this shorter side in pixels, as JPEG of quality 95. 0 = keep all bytes.
        processes: How many processes write shards.
        decoding: The limit on pixels, and the ground behind transparent ones where images are reduced.
        skip_unreadable: Leave out what cannot be converted, instead of refusing the whole source.

    Raises:
        DataError: `out` holds anything but an equal conversion, finished or begun. Or some images cannot be converted;
            then nothing is written, and the sentence names all of them.
        EnvironmentProblem: Another process converts into `out`.
    """
    if not len(source.keys):
        raise DataError(f"{source.name} has no images; nothing to convert")
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with converting(out) as lock:
            options = _Options(seed, samples_per_shard, shorter_side, decoding)
            return _convert(source, out, options, processes, skip_unreadable, lock)
    except BaseException as error:
        if not existed:
            with contextlib.suppress(OSError):  # it stays if it holds anything
                out.rmdir()
        if isinstance(error, OSError) and error.filename is None:  # a failed write does not say where
            raise OSError(error.errno or errno.EIO, error.strerror, str(out)) from None
        raise


def _convert(
    source: Source, out: Path, options: _Options, processes: int, skip_unreadable: bool, lock: int
) -> Converted:
    seed, samples_per_shard, shorter_side, decoding = options
    choices = () if decoding == DEFAULT else (*decoding.ground, decoding.max_pixels)
    plan, content = plan_digest(source, seed, samples_per_shard, shorter_side, *choices), content_digest(source)
    before = Progress.read(out, source.names or source.keys)
    if before and (out / HEADER).exists():
        before.check_finished(out, plan, content)
        return Converted(read_manifest(out), True, table(len(source.keys), source.left_out, before.problems))
    problems = dict(source.problems)
    problems |= check_images(source, decoding, processes, lock)
    if problems and not skip_unreadable:
        raise refusal(source, problems)
    order, chunks = cut_shards(source, problems, seed, samples_per_shard)
    paths = [out / f"{k:06d}.tar" for k in range(len(chunks))]
    digests = shard_digests(source, chunks)
    names = source.names or source.keys
    progress = Progress(plan, content, digests, {item: problem.kind for item, problem in problems.items()}, names)
    progress.begin(out, before, paths)
    jobs = list(zip(chunks, paths, strict=True))
    write = functools.partial(write_shard, source, shorter_side, decoding)
    counts = [len(chunk) for chunk in chunks]
    indices = list(run_parallel(write, jobs, processes, "images", counts, [lock]))
    if shard_digests(source, chunks) != digests:
        raise DataError(f"{source.name} changed while it was converted; start the same command again")
    manifest = write_manifest(out, source.classes, indices)
    keep_source_names(source, manifest, order)
    progress.finish(out)
    return Converted(manifest, False, table(len(source.keys), source.left_out, progress.problems))


def cut_shards(
    source: Source, problems: Collection[int], seed: int = 0, samples_per_shard: int = SAMPLES_PER_SHARD
) -> tuple[list[int], list[list[int]]]:
    """Return the items of a source in the order of the dataset, without those in `problems`; and the items of each shard.

    Raises:
        DataError: None is left.
    """
    items = np.setdiff1d(np.arange(len(source.keys)), np.fromiter(problems, np.int64))
    if not len(items):
        raise DataError(f"{source.name} has no image that can be converted; nothing was written")
    shuffled = items if source.in_order else items[seeds.permutation(len(items), seed, _SHUFFLE)]
    order = shuffled.tolist()
    return order, [order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard)]


def keep_source_names(source: Source, manifest: Manifest, order: Sequence[int]) -> None:
    """Keep the names of the source's files where the lists of other people need them."""
    if len(source.names) and source.classes:
        keep_names(manifest, [storable(source.names[item]) for item in order])


def write_shard(source: Source, shorter_side: int, decoding: Decoding, job: tuple[list[int], Path]) -> ShardIndex:
    """Write one shard, unless it is there, and scan it.

    Args:
        source: The images.
        shorter_side: Reduce larger images to this shorter side; 0 = keep all bytes.
        decoding: The limit on pixels, and the ground behind transparent ones where images are reduced.
        job: The items of the shard, and its path.
    """
    items, path = job
    if not path.exists():
        from webdataset import TarWriter

        # Without times, names and modes of this moment, an equal conversion gives equal bytes.
        with (
            replacing(path) as temporary,
            temporary.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as writer,
        ):
            for item in items:
                extension, data = source.read(item)
                if shorter_side:
                    try:
                        extension, data = _reduce(extension, data, shorter_side, decoding)
                    except UnreadableImage as error:
                        raise DataError(
                            f"{source.name}/{source.keys[item]}.{extension}: {error}; repair or remove it, then convert again"
                        ) from None
                sample = {"__key__": source.keys[item], extension: data}
                if source.labels[item] >= 0:
                    sample["cls"] = str(source.labels[item]).encode()
                writer.write(sample)
    return scan_shard(path, len(source.classes))


def _reduce(extension: str, data: bytes, shorter_side: int, decoding: Decoding = DEFAULT) -> tuple[str, bytes]:
    """Return the file ending and the bytes of the reduced image: upright, with its profile if that describes RGB."""
    header = read_header(data)
    if min(header.width, header.height) <= shorter_side:
        return extension, data
    picture = Image.fromarray(decode(data, decoding))
    factor = shorter_side / min(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    buffer = io.BytesIO()
    reduced = picture.resize(size, Image.Resampling.BICUBIC) if factor < 1 else picture
    reduced.save(buffer, "JPEG", quality=95, icc_profile=header.rgb_profile)
    return "jpg", buffer.getvalue()
