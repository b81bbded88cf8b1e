"""Images to shards and a manifest: in parallel, resumable, atomic per shard.

Shards are written by webdataset's TarWriter, so every WebDataset reader opens them: an image and its class number
(`cls`) per sample. A shard carries its final name only when it is whole; a second call keeps the whole ones.
"""

import hashlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from pipeline import seeds
from pipeline.datasets.convert.sources import Source
from pipeline.datasets.manifest import HEADER, Manifest, ShardIndex, read_manifest, write_manifest
from pipeline.datasets.tars import scan_shard
from pipeline.errors import DataError
from pipeline.images import decode

PLAN = "convert.json"
_SHUFFLE = 21  # stream of random numbers

T = TypeVar("T")
R = TypeVar("R")


def convert(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 2_000,
    shorter_side: int = 0,
    processes: int = 1,
) -> tuple[Manifest, bool]:
    """The dataset in `out` and whether it was there already. Samples are shuffled over the shards with `seed`.

    Image bytes are kept as they are; with `shorter_side` in pixels, larger images are reduced to it as JPEG.

    DataError if `out` holds anything but an equal conversion, finished or begun.
    """
    count = len(source.keys)
    if not count:
        raise DataError(f"{source.name} has no images; nothing to convert")
    order = np.arange(count) if source.in_order else seeds.permutation(count, seed, _SHUFFLE)
    chunks = [order[first : first + samples_per_shard].tolist() for first in range(0, count, samples_per_shard)]
    plan = _plan(source, seed, samples_per_shard, shorter_side)
    out.mkdir(parents=True, exist_ok=True)
    _check_plan(out, plan, source.name)
    if (out / HEADER).exists():
        return read_manifest(out), True
    jobs = [(source, chunk, out / f"{k:06d}.tar", shorter_side) for k, chunk in enumerate(chunks)]
    indices = list(run_parallel(_write_shard, jobs, processes, "shards"))
    return write_manifest(out, source.classes, indices), False


def run_parallel(work: Callable[[T], R], jobs: list[T], processes: int, unit: str) -> Iterable[R]:
    """work(job) for every job, in order, with a progress bar on a terminal."""
    from tqdm import tqdm

    silent = not sys.stderr.isatty()
    if processes <= 1 or len(jobs) == 1:
        yield from tqdm(map(work, jobs), total=len(jobs), unit=unit, disable=silent)
        return
    # Fork: a source may hold large arrays, and nothing here has threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        try:
            yield from tqdm(pool.map(work, jobs), total=len(jobs), unit=unit, disable=silent)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _plan(source: Source, *options: int) -> str:
    """What an equal conversion has in common."""
    digest = hashlib.sha256(json.dumps([list(source.classes), *options]).encode())
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{key}\0{label}\n".encode())
    return digest.hexdigest()


def _check_plan(out: Path, plan: str, name: str) -> None:
    path = out / PLAN
    if not path.exists():
        if any(out.glob("*.tar")) or (out / HEADER).exists():
            raise DataError(f"{out} already holds shards of other origin; choose an empty folder")
        path.write_text(json.dumps({"plan": plan, "source": name}) + "\n")
    elif json.loads(path.read_text()).get("plan") != plan:
        raise DataError(
            f"{out} holds another conversion ({json.loads(path.read_text()).get('source')}), or its source has "
            "changed since; choose an empty folder or delete this one"
        )


def _write_shard(job: tuple[Source, list[int], Path, int]) -> ShardIndex:
    source, items, path, shorter_side = job
    if not path.exists():
        from webdataset import TarWriter

        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            # Without times, names and modes of this moment, an equal conversion gives equal bytes.
            with TarWriter(file, encoder=False, mtime=0) as writer:
                for item in items:
                    extension, data = source.read(item)
                    if shorter_side:
                        extension, data = _reduce(extension, data, shorter_side)
                    sample = {"__key__": source.keys[item], extension: data}
                    if source.labels[item] >= 0:
                        sample["cls"] = str(source.labels[item]).encode()
                    writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return scan_shard(path, len(source.classes))


def _reduce(extension: str, data: bytes, shorter_side: int) -> tuple[str, bytes]:
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= shorter_side:
            return extension, data
    picture = Image.fromarray(decode(data))
    factor = shorter_side / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    buffer = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return "jpg", buffer.getvalue()
