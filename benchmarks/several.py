"""Benchmark of opening three datasets of together 14 million samples as one: python -m benchmarks.several.

The manifests are synthetic, and two of the three have no labels. The last line is a JSON object. Needs 1 GB of temporary
space.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.cli import guarded
from pipeline.datasets.joint import read_manifests
from pipeline.datasets.manifest import HEADER, NAMES, SAMPLE, SAMPLES, Shard
from pipeline.files import replace_bytes, replace_text
from pipeline.streaming.order import cut_blocks

SIZES = {"labelled": 1_280_000, "pool": 5_000_000, "more": 7_720_000}
PER_SHARD, NUM_CLASSES, MEAN_BYTES = 2_000, 1_000, 110_000


def write_synthetic(folder: Path, size: int, labelled: bool) -> None:
    """Write a manifest of `size` samples that exist nowhere."""
    folder.mkdir()
    rng = np.random.default_rng(size)
    lengths = rng.integers(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2, (size // PER_SHARD, PER_SHARD))
    offsets = np.cumsum(lengths + 2048, axis=1) - lengths
    members = b"".join(b"photo-%08d.jpeg" % k for k in range(size))
    samples = np.zeros(size, SAMPLE)
    samples["offset"], samples["length"] = offsets.ravel(), lengths.ravel()
    samples["name"] = np.arange(size) * (len(members) // size)
    samples["label"] = rng.integers(0, NUM_CLASSES, size) if labelled else -1
    with (folder / SAMPLES).open("wb") as file:
        np.save(file, samples)
    ends = (offsets + lengths)[:, -1].tolist()
    shards = [Shard(name=f"{k:06d}.tar", size=end, sha256="0" * 64, count=PER_SHARD) for k, end in enumerate(ends)]
    header = {
        "version": 1,
        "location": "https://nowhere.invalid",
        "num_samples": size,
        "samples_sha256": replace_bytes(folder / SAMPLES, (folder / SAMPLES).read_bytes()),
        "names_sha256": replace_bytes(folder / NAMES, members),
        "classes": [f"n{c:08d}" for c in range(NUM_CLASSES)] if labelled else [],
        "shards": [asdict(shard) for shard in shards],
    }
    replace_text(folder / HEADER, json.dumps(header))


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Measure the opening and the cut into blocks, and print them as JSON."""
    argparse.ArgumentParser("python -m benchmarks.several", description=__doc__).parse_args(words)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / key for key in SIZES]
        for folder in folders:
            write_synthetic(folder, SIZES[folder.name], folder.name == "labelled")
        opened = []
        for _ in range(5):
            start = time.perf_counter()
            joint = read_manifests(folders)
            opened.append(time.perf_counter() - start)
        found |= {
            "samples": joint.num_samples,
            "open_seconds": float(np.median(opened)),
            "open_seconds_best": min(opened),
        }
        start = time.perf_counter()
        cut_blocks(joint, np.arange(joint.num_samples), 1024)
        found["cut_blocks_seconds"] = time.perf_counter() - start
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
