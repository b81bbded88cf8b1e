"""Manifests for WebDataset tars that exist already, here or behind a URL; the tars stay as they are."""

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.datasets.manifest import (
    HEADER,
    NAMES,
    SAMPLES,
    Manifest,
    ShardIndex,
    read_manifest,
    sample_key,
    write_manifest,
)
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.tars import scan_shard
from pipeline.errors import DataError
from pipeline.files import replace_bytes
from pipeline.storage.config import RemoteConfig
from pipeline.storage.remote import fetch, remote_size


def index_folder(folder: Path, classes: Sequence[str] | None, processes: int) -> tuple[Manifest, bool]:
    """Write a manifest beside the WebDataset tars of a folder, unless it is there already.

    Args:
        folder: Folder of the tars.
        classes: Names of the classes; None = their numbers.
        processes: How many processes scan tars.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        DataError: There are no tars, one of them is damaged, or two hold the same sample.
    """
    if (folder / HEADER).exists():
        return read_manifest(folder), True
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder} has no .tar files; give a folder of WebDataset tars")
    scan = functools.partial(scan_shard, num_classes=len(classes) if classes else None)
    return _write_index(folder, classes, list(run_parallel(scan, tars, processes, "shards"))), False


def index_remote(
    source: str, out: Path, classes: Sequence[str] | None, remote: RemoteConfig, processes: int
) -> tuple[Manifest, bool]:
    """Write a manifest in `out` for shards that stay at a URL, unless it is there already.

    Args:
        source: URL of a folder with a manifest, which is copied. Or URLs of tars with a range of numbers in braces, as
            WebDataset writes it (https://host/train-{000000..000063}.tar); each tar is then read once.
        out: Folder for the manifest.
        classes: Names of the classes; None = their numbers.
        remote: How the shards are fetched.
        processes: How many processes scan tars.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        DataError: A tar cannot be fetched or is damaged, or two hold the same sample.
    """
    if (out / HEADER).exists():
        return read_manifest(out), True
    out.mkdir(parents=True, exist_ok=True)
    if "{" not in source:
        for name in (SAMPLES, NAMES, HEADER):
            content = io.BytesIO()
            url = f"{source.rstrip('/')}/{name}"
            size = remote_size(url, remote)
            fetch(url, 0, size, size, remote, content)
            data = content.getvalue()
            if name == HEADER:
                data = json.dumps(json.loads(data) | {"location": source.rstrip("/")}, indent=1).encode()
            replace_bytes(out / name, data)
        return read_manifest(out), False
    from webdataset.shardlists import expand_urls

    urls = expand_urls(source)
    scan = functools.partial(_scan_remote, out=out, remote=remote, num_classes=len(classes) if classes else None)
    indices = list(run_parallel(scan, urls, processes, "shards"))
    return _write_index(out, classes, indices, urls[0].rpartition("/")[0]), False


def _scan_remote(url: str, out: Path, remote: RemoteConfig, num_classes: int | None) -> ShardIndex:
    path = out / url.rpartition("/")[2]
    size = remote_size(url, remote)
    try:
        with path.open("wb") as file:
            fetch(url, 0, size, size, remote, file)
        return scan_shard(path, num_classes)
    finally:
        path.unlink(missing_ok=True)


def _write_index(
    folder: Path, classes: Sequence[str] | None, indices: list[ShardIndex], location: str = ""
) -> Manifest:
    seen: dict[str, str] = {}
    for index in indices:
        for member in index.members:
            if seen.setdefault(sample_key(member), index.shard.name) != index.shard.name:
                first = seen[sample_key(member)]
                raise DataError(f"sample {sample_key(member)!r} is in {first} and in {index.shard.name}; remove one")
    if classes is None:
        classes = [str(c) for c in range(1 + max((max(index.labels, default=-1) for index in indices), default=-1))]
    return write_manifest(folder, classes, indices, location)
