"""What a dataset is: shards with sizes and checksums; per sample its member, bytes, label; the classes.

Three files beside the tars. `manifest.json` holds the shards, the classes and the checksums of the other two;
`manifest.samples.npy` is a table of 24 bytes a sample, `manifest.names.bin` the member names end to end. Both are
memory-mapped, so that 1.28 million samples open in a fraction of a second and the workers of a node share them.
A sample's sample_index is its row: shards in order of name, samples in order of their bytes.
"""

import functools
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import DataError

VERSION = 1
SAMPLE = np.dtype([("offset", "<u8"), ("name", "<u8"), ("length", "<u4"), ("label", "<i4")])
HEADER, SAMPLES, NAMES = "manifest.json", "manifest.samples.npy", "manifest.names.bin"


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str  # a plain file name: a shard lies beside its manifest, or directly under `Manifest.location`
    size: int  # bytes
    sha256: str
    count: int  # samples


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """A shard and its samples, as a scan of the tar found them."""

    shard: Shard
    members: list[str]  # of the images
    offsets: list[int]  # of the image's first byte in the tar
    lengths: list[int]
    labels: list[int]  # -1 where none is known


class Manifest:
    """An opened dataset. Read-only; crossing to another process reopens the files."""

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        digest: str,
        samples: NDArray[np.void],
        names: NDArray[np.uint8],
    ) -> None:
        self.folder = folder
        self.hash = digest  # of everything but the location: a copy elsewhere is the same dataset
        self.location: str = header["location"]  # empty: the shards lie in `folder`; else a URL
        self.classes: tuple[str, ...] = tuple(header["classes"])
        self.shards = tuple(Shard(**shard) for shard in header["shards"])
        self.samples = samples
        self._names = names
        self._ends = np.cumsum([shard.count for shard in self.shards])  # first sample_index after each shard

    def __reduce__(self) -> tuple[Any, ...]:
        return read_manifest, (self.folder,)

    def __repr__(self) -> str:
        return f"Manifest({self.folder}, {self.num_samples} samples, {len(self.shards)} shards)"

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """(num_samples,) class of each sample, -1 where none is known."""
        return self.samples["label"].astype(np.int64)

    def shard_of(self, sample_indices: ArrayLike) -> NDArray[np.int64]:
        """The index of the shard that holds each sample_index."""
        return np.searchsorted(self._ends, sample_indices, side="right")

    def member(self, sample_index: int) -> str:
        """The image's name in its tar."""
        start = int(self.samples["name"][sample_index])
        last = sample_index + 1 == self.num_samples
        stop = len(self._names) if last else int(self.samples["name"][sample_index + 1])
        return self._names[start:stop].tobytes().decode()

    def key(self, sample_index: int) -> str:
        """WebDataset's key: the member's name up to the first dot of its last part."""
        return sample_key(self.member(sample_index))


def sample_key(member: str) -> str:
    folder, slash, name = member.rpartition("/")
    return folder + slash + name.split(".", 1)[0]


def read_manifest(folder: Path) -> Manifest:
    """Open the dataset in `folder`; DataError if it is missing, damaged, or does not match its tars' sizes."""
    folder = Path(folder)
    path = folder / HEADER
    try:
        raw = path.read_bytes()
    except OSError:
        tars = "its tars have no manifest yet" if any(folder.glob("*.tar")) else "there are no shards"
        raise DataError(
            f"{path} does not exist: {tars}; `python -m pipeline.data convert --help` shows how to make a dataset"
        ) from None
    try:
        header = json.loads(raw)
        if header["version"] != VERSION:
            raise DataError(f"{path} has version {header['version']}, this code reads {VERSION}: convert again")
        _check_content(folder / SAMPLES, header["samples_sha256"])
        _check_content(folder / NAMES, header["names_sha256"])
        names = np.memmap(folder / NAMES, np.uint8, "r") if header["num_samples"] else np.zeros(0, np.uint8)
        samples = np.load(folder / SAMPLES, mmap_mode="r" if header["num_samples"] else None, allow_pickle=False)
        manifest = Manifest(folder, header, _identity(header), samples, names)
        problem = _problem(manifest, header)
    except (KeyError, TypeError, ValueError, OSError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged ({reason}); convert again or restore it") from None
    if problem:
        raise DataError(f"{path} {problem}; convert again or restore the files it describes")
    if not manifest.location:
        check_sizes(manifest)
    return manifest


def check_sizes(manifest: Manifest) -> None:
    """DataError unless every local shard exists with the size that the manifest states."""
    for shard in manifest.shards:
        path = manifest.folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DataError(f"{path} is missing, but {HEADER} lists it; restore the shard or convert again")
        if size != shard.size:
            raise DataError(
                f"{path} has {size} bytes, {HEADER} says {shard.size}: the shard was changed or cut off; "
                "restore it or convert again"
            )


def write_manifest(folder: Path, classes: Sequence[str], indices: Sequence[ShardIndex], location: str = "") -> Manifest:
    """Write the three files, the header last, so that a manifest which can be read is complete."""
    samples = np.zeros(sum(index.shard.count for index in indices), SAMPLE)
    for field, values in (
        ("offset", [offset for index in indices for offset in index.offsets]),
        ("length", [length for index in indices for length in index.lengths]),
        ("label", [label for index in indices for label in index.labels]),
    ):
        samples[field] = values
    members = [member.encode() for index in indices for member in index.members]
    samples["name"] = np.cumsum([0, *(len(member) for member in members)])[:-1]
    header = {
        "version": VERSION,
        "location": location,
        "num_samples": len(samples),
        "samples_sha256": _write(folder / SAMPLES, _npy(samples)),
        "names_sha256": _write(folder / NAMES, b"".join(members)),
        "classes": list(classes),
        "shards": [asdict(index.shard) for index in indices],
    }
    _write(folder / HEADER, (json.dumps(header, indent=1) + "\n").encode())
    return read_manifest(folder)


def _npy(samples: NDArray[np.void]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, samples)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> str:
    """Write all or nothing; returns the sha256."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return hashlib.sha256(content).hexdigest()


def _identity(header: dict[str, Any]) -> str:
    """sha256 of the header without its location; the header itself holds the checksums of everything else."""
    content = {name: value for name, value in header.items() if name != "location"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_content(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise DataError(f"{path} is not the file that {HEADER} was written with; convert again or restore it")


def _problem(manifest: Manifest, header: dict[str, Any]) -> str:
    """What contradicts itself in a manifest whose checksums hold; empty if nothing does."""
    samples, shards = manifest.samples, manifest.shards
    if not isinstance(header["classes"], list) or not all(isinstance(name, str) for name in header["classes"]):
        return "has no list of class names"
    if samples.dtype != SAMPLE or samples.ndim != 1:
        return "has a sample table of another form"
    if not shards or not len(samples):
        return "describes no samples"
    if len(samples) != header["num_samples"] or len(samples) != sum(shard.count for shard in shards):
        return f"counts {header['num_samples']} samples, but its table has {len(samples)}"
    for shard in shards:
        if shard.count < 0 or "/" in shard.name or "\\" in shard.name or shard.name in ("", ".", ".."):
            return f"lists a shard named {shard.name!r}, which does not lie in the dataset's folder"
    if len({shard.name for shard in shards}) != len(shards):
        return "lists a shard twice"
    if manifest.location.split("://")[0] not in ("", "http", "https", "s3"):
        return f"has its shards at {manifest.location!r}, which is neither here nor http(s) nor s3"
    sizes = np.repeat([shard.size for shard in shards], [shard.count for shard in shards]).astype(np.uint64)
    ends = samples["offset"] + samples["length"]
    if (ends > sizes).any() or (ends < samples["offset"]).any():
        return f"places sample {int((ends > sizes).argmax())} outside its shard"
    if (np.diff(samples["name"].astype(np.int64)) <= 0).any() or samples["name"][-1] >= len(manifest._names):
        return "has member names out of order"
    labels = samples["label"]
    if labels.min() < -1 or labels.max() >= max(1, len(manifest.classes)):
        return f"has labels from {labels.min()} to {labels.max()} for {len(manifest.classes)} classes"
    return ""
