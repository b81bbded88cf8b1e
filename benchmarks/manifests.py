"""How fast a dataset opens: a manifest of ImageNet's size, and three that have 14 million samples together. No images exist."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import psutil

from pipeline.datasets.joint import read_manifests
from pipeline.datasets.manifest import HEADER, NAMES, SAMPLE, SAMPLES, Shard, ShardIndex, read_manifest, write_manifest
from pipeline.exports.card import IMAGENET
from pipeline.storage.config import RemoteConfig
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Loader
from pipeline.streaming.order import shuffle_quality
from pipeline.streaming.transforms import train_views

SEVERAL = (8_000_000, 4_000_000, 2_000_000)  # samples
TURNS = 5


def seek(folder: Path) -> dict[str, float]:
    """Open a manifest of ImageNet's size, build the loader, find the step at 90 % of an epoch; no images exist."""
    shards, per_shard, image = 641, 2000, 110_000
    rng = np.random.default_rng(0)
    indices = []
    for s in range(shards):
        lengths = rng.integers(image // 2, image * 3 // 2, per_shard)
        offsets = np.cumsum(np.concatenate([[1536], lengths[:-1] + 2048]))
        shard = Shard(
            name=f"{s:06d}.tar", size=int(offsets[-1] + lengths[-1] + 10240), sha256="0" * 64, count=per_shard
        )
        members = [f"n{k % 1000:08d}/n{k % 1000:08d}_{s * per_shard + k}.jpeg" for k in range(per_shard)]
        labels = rng.integers(0, 1000, per_shard).tolist()
        indices.append(
            ShardIndex(shard=shard, members=members, offsets=offsets.tolist(), lengths=lengths.tolist(), labels=labels)
        )
    folder.mkdir()
    write_manifest(folder, [f"n{c:08d}" for c in range(1000)], indices, location="https://nowhere.invalid")
    views = train_views((224, 224), AugmentConfig(), IMAGENET.mean, IMAGENET.std)
    config = LoaderConfig(virtual_readers=64, remote=RemoteConfig(cache=str(folder / "cache")))
    options = {"global_batch": 1024, "rank": 0, "world_size": 1, "seed": 0, "views": views, "config": config}
    resident = psutil.Process().memory_info().rss
    start = time.perf_counter()
    manifest = read_manifest(folder)
    opened = time.perf_counter()
    everything = np.arange(manifest.num_samples)
    more = psutil.Process().memory_info().rss - resident
    built = time.perf_counter()
    loader = Loader(manifest, everything, **options)
    step = int(0.9 * loader.steps_per_epoch)
    loader.order.step(step, range(64))
    stop = time.perf_counter()
    files = sum(path.stat().st_size for path in folder.glob("manifest.*"))
    return {
        "seek_seconds_at_90_percent": stop - built + opened - start,
        "manifest_open_seconds": opened - start,
        "manifest_megabytes": files / 1e6,
        "manifest_resident_megabytes": more / 1e6,
        "shuffle_quality": shuffle_quality(loader.order, manifest),
    }


def open_several(folder: Path) -> dict[str, float]:
    """Open three datasets of 14 million samples together as one; the median of TURNS turns."""
    for number, count in enumerate(SEVERAL):
        _write_large(folder / str(number), count)
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        joint = read_manifests([folder / str(number) for number in range(len(SEVERAL))])
        times.append(time.perf_counter() - start)
    assert joint.num_samples == sum(SEVERAL)
    return {"open_seconds_14_million": sorted(times)[TURNS // 2]}


def _write_large(folder: Path, count: int) -> None:
    """Write the manifest of `count` samples, without the lists of Python that a conversion makes."""
    folder.mkdir(parents=True)
    per_shard, length, letters = 10_000, 110_000, 24
    samples = np.zeros(count, SAMPLE)
    place = np.arange(count)
    samples["offset"] = 1536 + place % per_shard * (length + 2048)
    samples["name"], samples["length"], samples["label"] = place * letters, length, place % 1000
    np.save(folder / SAMPLES, samples)
    (folder / NAMES).write_bytes(np.char.mod(f"%0{letters - 4}d.jpg", place).astype("S").tobytes())
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (SAMPLES, NAMES)}
    size = 1536 + per_shard * (length + 2048) + 10_240
    header = {
        "version": 1,
        "location": f"https://nowhere.invalid/{folder.name}",
        "num_samples": count,
        "samples_sha256": digests[SAMPLES],
        "names_sha256": digests[NAMES],
        "classes": [f"n{c:08d}" for c in range(1000)],
        "shards": [
            {"name": f"{s:06d}.tar", "size": size, "sha256": "0" * 64, "count": per_shard}
            for s in range(count // per_shard)
        ],
    }
    (folder / HEADER).write_text(json.dumps(header))
