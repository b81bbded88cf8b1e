"""Check that a dataset still is what its manifest says, down to every image."""

import hashlib
from collections.abc import Iterator

from pipeline.datasets.manifest import Manifest
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.tars import scan_shard
from pipeline.errors import DataError
from pipeline.images import UnreadableImage, decode


def verify(manifest: Manifest, processes: int = 1) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong: checksums, members, offsets, labels, images that do not decode.

    Args:
        manifest: The dataset.
        processes: How many processes check shards.

    Raises:
        DataError: The shards are remote.
    """
    if manifest.location:
        raise DataError(
            f"the shards of {manifest.folder} are at {manifest.location}; run verify on the machine that holds them"
        )
    jobs = [(manifest, shard) for shard in range(len(manifest.shards))]
    for problems in run_parallel(_verify_shard, jobs, processes, "shards"):
        yield from problems


def _verify_shard(job: tuple[Manifest, int]) -> list[str]:
    manifest, index = job
    shard = manifest.shards[index]
    path = manifest.folder / shard.name
    stop = sum(s.count for s in manifest.shards[: index + 1])
    sample_indices = range(stop - shard.count, stop)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return [f"{path}: the sha256 differs from the manifest's; the shard was changed"]
        problems = []
        try:
            found = scan_shard(path, len(manifest.classes) or None)
        except DataError as error:
            return [str(error)]
        rows = manifest.samples[sample_indices.start : sample_indices.stop]
        members = [manifest.member(sample_index) for sample_index in sample_indices]
        stated = (members, *(rows[name].tolist() for name in ("offset", "length", "label")))
        if stated != (found.members, found.offsets, found.lengths, found.labels):
            problems.append(f"{path}: the samples of the manifest are not those of the tar; convert again")
        for sample_index, offset, length in zip(
            sample_indices, rows["offset"].tolist(), rows["length"].tolist(), strict=True
        ):
            file.seek(offset)
            try:
                decode(file.read(length))
            except UnreadableImage as error:
                problems.append(f"{path}: sample {manifest.key(sample_index)!r} (sample index {sample_index}): {error}")
    return problems
