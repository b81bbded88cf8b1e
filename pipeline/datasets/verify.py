"""Check that a dataset still is what its manifest says, down to every image."""

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.manifest import HEADER, Manifest
from pipeline.datasets.opening import ImageFolder, verify_files
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.tars import MemberRules, scan_members
from pipeline.decoding import DEFAULT, Decoding
from pipeline.errors import DataError
from pipeline.images import UnreadableImage, decode


def verify(manifest: Manifest, processes: int = 1, decoding: Decoding = DEFAULT) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong: checksums, members, offsets, labels, images that do not decode.

    Args:
        manifest: The dataset.
        processes: How many processes check shards.
        decoding: The limit on pixels.

    Raises:
        DataError: The shards are remote.
    """
    if isinstance(manifest, ImageFolder):
        yield from verify_files(manifest, processes, decoding)
        return
    if manifest.location:
        raise DataError(
            f"the shards of {manifest.folder} are at {manifest.location}; run verify on the machine that holds them"
        )
    check = functools.partial(_verify_shard, manifest, decoding)
    for problems in run_parallel(check, range(len(manifest.shards)), processes, "shards"):
        yield from problems


def _verify_shard(manifest: Manifest, decoding: Decoding, index: int) -> list[str]:
    shard = manifest.shards[index]
    path = manifest.folder / shard.name
    stop = sum(s.count for s in manifest.shards[: index + 1])
    sample_indices = range(stop - shard.count, stop)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            return [f"{path}: the sha256 differs from the manifest's; the shard was changed"]
        problems = []
        try:
            found = _scanned(manifest, path)
        except DataError as error:
            return [str(error)]
        rows = manifest.samples[sample_indices.start : sample_indices.stop]
        members = [manifest.member(sample_index) for sample_index in sample_indices]
        stated = (members, *(rows[name].tolist() for name in ("offset", "length", "label")))
        if stated != found:
            problems.append(f"{path}: the samples of the manifest are not those of the tar; convert again")
        for sample_index, offset, length in zip(
            sample_indices, rows["offset"].tolist(), rows["length"].tolist(), strict=True
        ):
            file.seek(offset)
            try:
                decode(file.read(length), decoding)
            except UnreadableImage as error:
                problems.append(f"{path}: sample {manifest.key(sample_index)!r} (sample index {sample_index}): {error}")
    return problems


def _scanned(manifest: Manifest, path: Path) -> tuple[list[str], list[int], list[int], list[int]]:
    """Return members, offsets, lengths and labels of a tar, read by the rules that the manifest was made with."""
    stated = json.loads((manifest.folder / HEADER).read_bytes()).get("member_rules") or {}
    rules = MemberRules(**stated)
    scan = scan_members(path, len(manifest.classes) or None, rules)
    index, texts = scan.index, scan.texts
    labels = index.labels
    if any(text and not (text.isascii() and text.isdigit()) for text in texts):
        _, label_of = class_labels({text for text in texts if text}, manifest.classes, str(path))
        labels = [label_of[text] if text else -1 for text in texts]
    rows = list(zip(index.members, index.offsets, index.lengths, labels, strict=True))
    if rules.skip_unreadable:
        known = {manifest.member(sample_index) for sample_index in range(manifest.num_samples)}
        rows = [row for row in rows if row[0] in known]
    members, offsets, lengths, found = ([row[k] for row in rows] for k in range(4))
    return members, offsets, lengths, found  # type: ignore[return-value]
