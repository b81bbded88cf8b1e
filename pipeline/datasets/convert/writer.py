"""Conversion of a source into shards and a manifest: in parallel, and continued where it was stopped.

Shards are written by webdataset's TarWriter, so every WebDataset reader opens them. A sample is an image and, where it is
known, its class number (`cls`). A shard has its final name only when it is whole, and a second call keeps whole shards.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import seeds
from pipeline.datasets.convert.source import Source
from pipeline.datasets.manifest import HEADER, Manifest, ShardIndex, read_manifest, write_manifest
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.tars import scan_shard
from pipeline.errors import DataError
from pipeline.files import replace_text, replacing
from pipeline.images import UnreadableImage, decode, read_header

PLAN = "convert.json"
_SHUFFLE = 21  # stream of random numbers


def convert(
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 2_000,
    shorter_side: int = 0,
    processes: int = 1,
) -> tuple[Manifest, bool]:
    """Write the dataset of `source` to `out`, unless it is there already.

    Args:
        source: The images.
        out: Folder of the dataset.
        seed: Seed of the shuffle over the shards; a source that is slow in another order is not shuffled.
        samples_per_shard: Images in each shard; the last one may hold fewer.
        shorter_side: Reduce larger images to this shorter side in pixels, as JPEG of quality 95. 0 = keep all bytes.
        processes: How many processes write shards.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        DataError: `out` holds anything but an equal conversion, finished or begun.
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


def _plan(source: Source, *options: int) -> str:
    """Return a digest that only an equal conversion shares."""
    digest = hashlib.sha256(json.dumps([list(source.classes), *options]).encode())
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{key}\0{label}\n".encode())
    return digest.hexdigest()


def _check_plan(out: Path, plan: str, name: str) -> None:
    path = out / PLAN
    if not path.exists():
        if any(out.glob("*.tar")) or (out / HEADER).exists():
            raise DataError(f"{out} already holds shards that this command did not make; give another folder as --out")
        replace_text(path, json.dumps({"plan": plan, "source": name}) + "\n")
    elif json.loads(path.read_text()).get("plan") != plan:
        raise DataError(
            f"{out} holds another conversion ({json.loads(path.read_text()).get('source')}), or its source has "
            "changed since; give another folder as --out, or delete this one"
        )


def _write_shard(job: tuple[Source, list[int], Path, int]) -> ShardIndex:
    source, items, path, shorter_side = job
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
                        extension, data = _reduce(extension, data, shorter_side)
                    except UnreadableImage as error:
                        raise DataError(
                            f"{source.name}/{source.keys[item]}.{extension}: {error}; repair or remove it, then convert again"
                        ) from None
                sample = {"__key__": source.keys[item], extension: data}
                if source.labels[item] >= 0:
                    sample["cls"] = str(source.labels[item]).encode()
                writer.write(sample)
    return scan_shard(path, len(source.classes))


def _reduce(extension: str, data: bytes, shorter_side: int) -> tuple[str, bytes]:
    """Return the file ending and the bytes of the reduced image: upright, with its profile if that describes RGB."""
    header = read_header(data)
    if min(header.width, header.height) <= shorter_side:
        return extension, data
    picture = Image.fromarray(decode(data))
    factor = shorter_side / min(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    buffer = io.BytesIO()
    reduced = picture.resize(size, Image.Resampling.BICUBIC) if factor < 1 else picture
    reduced.save(buffer, "JPEG", quality=95, icc_profile=header.rgb_profile)
    return "jpg", buffer.getvalue()
