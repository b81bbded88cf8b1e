"""Benchmark of reading data: python -m benchmarks.data [--rounds 5]. Its last line is a JSON object.

Throughput is compared with timm's own WebDataset path: its reader, its transforms, uint8 fast collate, its prefetcher's
normalisation. Both sides read the same shards with as many workers and take turns in one run; the clock runs between two
batches of the steady state. The ratio is the median over the turns, so that a machine shared with other work slows both.
Where other work takes most of the cores, the ratio of rates is noise, and that of the CPU times (`cpu_ms`: one process, no
workers, processor time per image) still says which side does less work. Needs about 400 MB of temporary space.
"""

import argparse
import io
import itertools
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.losses import silent_losses
from benchmarks.manifests import open_several, seek
from pipeline.cli import guarded
from pipeline.datasets.convert.source import Source
from pipeline.datasets.convert.writer import convert
from pipeline.datasets.manifest import HEADER, Manifest, read_manifest
from pipeline.exports.card import IMAGENET
from pipeline.images import decode_with_pillow, decode_with_simplejpeg
from pipeline.ops.torchvision_cpu import allow_torchvision
from pipeline.storage.config import RemoteConfig
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.geometry import crop_resize
from pipeline.streaming.loader import Loader
from pipeline.streaming.order import Order, cut_blocks, readers_of_rank
from pipeline.streaming.reader import Reader
from pipeline.streaming.transforms import train_views
from tests.unit.storage.flaky import serve

BATCH, WORKERS, NUM_IMAGES = 64, 2, 1536
FIRST, LAST = 4, 18  # between these batches the clock runs; the rest of the epoch keeps the workers busy
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
RANKS = 8
CPU_BATCHES = 3  # batches whose processor time is measured, after a first one


@dataclass
class Photographs(Source):
    """Crops of scikit-learn's two photographs, as JPEG of 500 x 375 and about 100 kB."""

    jpegs: list[bytes]
    name: str = "photographs"
    in_order: bool = False

    def __post_init__(self) -> None:
        self.classes = [str(c) for c in range(10)]
        self.keys = [f"photo-{k:05d}" for k in range(NUM_IMAGES)]
        self.labels = [k % 10 for k in range(NUM_IMAGES)]

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the extension and the bytes of one image."""
        return "jpg", self.jpegs[item % len(self.jpegs)]


def photographs(count: int = 128) -> Photographs:
    """Return a source of NUM_IMAGES images that repeats `count` random crops."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    jpegs = []
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    for k in range(count):
        photo = photos[k % 2]
        left, top = rng.integers(0, photo.width - 500), rng.integers(0, photo.height - 375)
        buffer = io.BytesIO()
        photo.crop((left, top, left + 500, top + 375)).save(buffer, "JPEG", quality=97)
        jpegs.append(buffer.getvalue())
    return Photographs(jpegs)


def steady_rate(batches: Iterable[int]) -> float:
    """Return the images per second between batch FIRST and batch LAST of an iterator of batch sizes."""
    seen, start = 0, 0.0
    for number, size in enumerate(itertools.islice(batches, LAST + 1)):
        if number == FIRST:
            start = time.perf_counter()
        elif number > FIRST:
            seen += size
    return seen / (time.perf_counter() - start)


def cpu_ms(batches: Iterable[int]) -> float:
    """Return the milliseconds of processor time per image of an iterator of batch sizes that has no workers."""
    sizes = iter(batches)
    next(sizes)
    start = time.process_time()
    seen = sum(itertools.islice(sizes, CPU_BATCHES))
    return 1e3 * (time.process_time() - start) / seen


def timm_batches(manifest: Manifest, rand_augment: str, workers: int) -> Generator[int, None, None]:
    """Yield the sizes of the batches of timm's path."""
    from timm.data import create_dataset, create_loader

    shards = f"{{000000..{len(manifest.shards) - 1:06d}}}.tar|{manifest.num_samples}"
    dataset = create_dataset("wds/", root=str(manifest.folder), split=shards, is_training=True, batch_size=BATCH)
    loader = create_loader(
        dataset,
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        color_jitter=0.0,
        auto_augment=rand_augment or None,
        interpolation="bicubic",
        num_workers=workers,
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    for _, labels in loader:
        yield len(labels)


def our_batches(manifest: Manifest, rand_augment: str, workers: int) -> Generator[int, None, None]:
    """Yield the sizes of the batches of our loader."""
    loader = Loader(
        manifest,
        np.arange(manifest.num_samples),
        global_batch=BATCH,
        rank=0,
        world_size=1,
        seed=0,
        views=train_views((224, 224), AugmentConfig(rand_augment=rand_augment), IMAGENET.mean, IMAGENET.std),
        config=LoaderConfig(virtual_readers=8, workers=workers),
    )
    try:
        for batch in loader.batches():
            yield len(batch)
    finally:
        loader.close()


def throughput(manifest: Manifest, rounds: int) -> dict[str, float]:
    """Measure both sides in turn, `rounds` times, without and with RandAugment."""
    found: dict[str, float] = {}
    for name, rand_augment in (("", ""), ("_randaugment", RAND_AUGMENT)):
        pairs, costs = [], []
        for turn in range(rounds):
            sides = [timm_batches, our_batches]
            rates, cpu = {}, {}
            for side in sides if turn % 2 else sides[::-1]:
                rates[side] = _measured(steady_rate, side(manifest, rand_augment, WORKERS))
                cpu[side] = _measured(cpu_ms, side(manifest, rand_augment, 0))
            pairs.append((rates[our_batches], rates[timm_batches]))
            costs.append((cpu[our_batches], cpu[timm_batches]))
            print(
                f"images/s{name}: ours {pairs[-1][0]:.0f}, timm {pairs[-1][1]:.0f};"
                f" CPU ms per image: ours {costs[-1][0]:.1f}, timm {costs[-1][1]:.1f}",
                flush=True,
            )
        found[f"images_per_second_vs_timm_webdataset{name}"] = statistics.median(a / b for a, b in pairs)
        found[f"images_per_second{name}"] = statistics.median(a for a, _ in pairs)
        found[f"images_per_second_timm{name}"] = statistics.median(b for _, b in pairs)
        found[f"cpu_ms_vs_timm_webdataset{name}"] = statistics.median(b / a for a, b in costs)
        found[f"cpu_ms{name}"] = statistics.median(a for a, _ in costs)
        found[f"cpu_ms_timm{name}"] = statistics.median(b for _, b in costs)
    return found


def _measured(measure: Callable[[Iterable[int]], float], batches: Generator[int, None, None]) -> float:
    """Return what is measured, and end the workers of the side before the other takes its turn."""
    try:
        return measure(batches)
    finally:
        batches.close()


def decoders(jpegs: list[bytes]) -> dict[str, float]:
    """Measure milliseconds per image on one core, in turn, and by how many levels of 255 the fast flags differ."""
    import simplejpeg

    def fast(data: bytes) -> np.ndarray:
        return simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)

    size, box = (224, 224), (40, 60, 250, 300)
    pixels = decode_with_pillow(jpegs[0])
    picture = Image.fromarray(pixels)
    corners = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    work: dict[str, Callable[[bytes], object]] = {
        "decode_ms_pillow": decode_with_pillow,
        "decode_ms_simplejpeg": decode_with_simplejpeg,
        "decode_ms_simplejpeg_fast_flags": fast,
        "resize_ms_pillow": lambda _: picture.resize(size, Image.Resampling.BICUBIC, box=corners),
        "resize_ms_torch": lambda _: crop_resize(pixels, box, size, "bicubic"),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for data in jpegs:
        for name, function in work.items():
            start = time.perf_counter()
            function(data)
            times[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)

    def levels(function: Callable[[bytes], np.ndarray]) -> float:
        found = [np.abs(function(data).astype(int) - decode_with_pillow(data)).mean() for data in jpegs[:16]]
        return float(np.mean(found))

    found = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return found | {
        "levels_off_simplejpeg": levels(decode_with_simplejpeg),
        "levels_off_simplejpeg_fast_flags": levels(fast),
    }


def bytes_fetched(folder: Path) -> dict[str, float]:
    """Read one epoch of 8 ranks over http: with a cache each, as on 8 nodes, and with a shared one. No decoding."""
    rng = np.random.default_rng(0)

    @dataclass
    class Noise(Source):
        name: str = "noise"
        in_order: bool = False

        def __post_init__(self) -> None:
            self.classes, self.labels = ["none"], [0] * 2400
            self.keys = [f"{k:05d}" for k in range(2400)]

        def read(self, item: int) -> tuple[str, bytes]:
            return "jpg", rng.bytes(int(rng.integers(40_000, 120_000)))

    local = convert(Noise(), folder / "shards", samples_per_shard=300).manifest
    everything = np.arange(local.num_samples)
    virtual_readers, batch = 8, 64
    found = {}
    with serve(local.folder) as (url, log):
        there = folder / "there"
        shutil.copytree(local.folder, there, ignore=shutil.ignore_patterns("*.tar"))
        header = json.loads((there / HEADER).read_text())
        (there / HEADER).write_text(json.dumps(header | {"location": url}))
        manifest = read_manifest(there)
        blocks, runs = cut_blocks(manifest, everything, virtual_readers)
        order = Order(everything, blocks, global_batch=batch, virtual_readers=virtual_readers, window=1024, seed=0)
        total = sum(shard.size for shard in manifest.shards)
        for name, caches in (("", RANKS), ("_shared_cache", 1)):
            log.ranges.clear()
            log.bytes_sent = 0
            readers = [
                Reader(manifest, everything, runs, RemoteConfig(cache=str(folder / f"cache{name}-{r % caches}")))
                for r in range(RANKS)
            ]
            for step in range(local.num_samples // batch):
                for rank, reader in enumerate(readers):
                    for sample_index in (
                        order.step(step, readers_of_rank(virtual_readers, rank, RANKS)).ravel().tolist()
                    ):
                        reader.read(sample_index)
            for reader in readers:
                reader.close()
            found[f"bytes_fetched_ratio{name}"] = log.bytes_sent / total
            found[f"requests_per_gb{name}"] = len(log.ranges) / (total / 1e9)
    return found


def first_epoch(manifest: Manifest) -> dict[str, int]:
    """Count samples that 8 ranks read twice or never in the first epoch."""
    views = train_views((32, 32), AugmentConfig(), IMAGENET.mean, IMAGENET.std)
    ranks = []
    for rank in range(RANKS):
        loader = Loader(
            manifest,
            np.arange(manifest.num_samples - 5),  # so that the epoch ends inside a batch
            global_batch=BATCH,
            rank=rank,
            world_size=RANKS,
            seed=0,
            views=views,
            config=LoaderConfig(virtual_readers=8, workers=0),
        )
        steps = -(-(manifest.num_samples - 5) // BATCH)
        ranks.append([batch.indices for batch in itertools.islice(loader.batches(), steps)])
        loader.close()
    stream = torch.cat([rank[step] for step in range(steps) for rank in ranks])[: manifest.num_samples - 5]
    distinct = len(stream.unique())
    return {
        "first_epoch_duplicates": len(stream) - distinct,
        "first_epoch_missing": manifest.num_samples - 5 - distinct,
    }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Measure everything and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    rounds = parser.parse_args(words).rounds
    logging.disable(logging.WARNING)  # timm warns at every start that it found no info file
    allow_torchvision()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = photographs()
        manifest = convert(source, folder / "photographs", samples_per_shard=256).manifest
        found: dict[str, float] = {"mean_jpeg_kilobytes": float(np.mean([len(jpeg) for jpeg in source.jpegs])) / 1e3}
        found |= decoders(source.jpegs)
        found |= throughput(manifest, rounds)
        found |= first_epoch(manifest)
        found |= seek(folder / "large")
        found |= open_several(folder / "several")
        losses = silent_losses(_made(folder / "corpus"))
        print(*losses, sep="\n", end="\n" if losses else "")
        found["silent_losses"] = len(losses)
        found |= bytes_fetched(folder / "remote")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
