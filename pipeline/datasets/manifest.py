"""The manifest of a dataset: its shards with sizes and checksums, its classes, and where each sample is.

The manifest is three files beside the tars. `manifest.json` holds the shards, the classes and the checksums of the other
two. `manifest.samples.npy` is a table of 24 bytes per sample, and `manifest.names.bin` holds the member names end to end.
Both are memory-mapped, so the workers of a node share them. 14 million samples open in about a second: the table is checked
in one pass, the names when they are first read.
The sample index is the row of a sample in the table: shards in order of name, samples in order of their bytes.
"""

import errno
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.datasets.tables import check_content, check_regular, check_table, open_table, write_table
from pipeline.datasets.text import is_file_name, is_text, sample_key
from pipeline.errors import DataError
from pipeline.files import read_regular, replace_bytes, replace_text
from pipeline.storage.config import KINDS

VERSION = 1
SAMPLE = np.dtype([("offset", "<u8"), ("name", "<u8"), ("length", "<u4"), ("label", "<i4")])
HEADER, SAMPLES, NAMES = "manifest.json", "manifest.samples.npy", "manifest.names.bin"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a dataset.

    Attributes:
        name: A plain file name; the tar is beside its manifest, or directly under `Manifest.location`.
        size: Bytes.
        sha256: Of the whole tar.
        count: Samples.
    """

    name: str
    size: int
    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """A shard and its samples, as a scan of the tar found them; the four lists have one entry per sample.

    Attributes:
        shard: The tar.
        members: Name of the image in the tar.
        offsets: First byte of the image in the tar.
        lengths: Bytes of the image.
        labels: Class; -1 where it is unknown.
    """

    shard: Shard
    members: list[str]
    offsets: list[int]
    lengths: list[int]
    labels: list[int]


class Manifest:
    """An opened dataset, read-only; `read_manifest` makes it, and pickling it reopens the files.

    Attributes:
        folder: Folder of the manifest.
        hash: SHA-256 of everything but the location: a copy elsewhere is the same dataset.
        location: URL of the shards; empty if they are in `folder`.
        classes: Names of the classes; a label is an index into them.
        shards: The tars, in order of name.
        samples: (num_samples,) the table of samples, of type `SAMPLE`.
    """

    locations: ClassVar[tuple[str, ...]] = tuple(KINDS)  # kinds of addresses that its shards may have

    def __init__(
        self,
        folder: Path,
        header: dict[str, Any],
        digest: str,
        samples: NDArray[np.void],
        names: NDArray[np.uint8],
    ) -> None:
        self.folder = folder
        self.hash = digest
        self.location: str = header["location"]
        self.classes: tuple[str, ...] = tuple(header["classes"])
        self.shards = tuple(Shard(**shard) for shard in header["shards"])
        self.samples = samples
        self._unchecked_names, self._names_sha256 = names, header.get("names_sha256", "")
        self._ends = np.cumsum([shard.count for shard in self.shards])  # first sample index after each shard

    def __reduce__(self) -> tuple[Any, ...]:
        return read_manifest, (self.folder,)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Manifest({self}, {self.num_samples} samples, {len(self.shards)} shards)"

    @property
    def num_samples(self) -> int:
        """How many samples the dataset has."""
        return len(self.samples)

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """(num_samples,) class of each sample; -1 where it is unknown."""
        return self.samples["label"].astype(np.int64)

    @functools.cached_property
    def _names(self) -> NDArray[np.uint8]:
        """The member names end to end. No training reads them, so they are hashed when something does."""
        if self._names_sha256:
            check_content(self.folder / NAMES, self._names_sha256)
        return self._unchecked_names

    @property
    def num_name_bytes(self) -> int:
        """How many bytes all member names have together."""
        return len(self._unchecked_names)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of all datasets that are read as this one."""
        return (self.folder,)

    @property
    def remote(self) -> bool:
        """Whether some shards are behind a URL."""
        return bool(self.location)

    @property
    def first_index(self) -> dict[str, int]:
        """The first sample index of each dataset, by its hash."""
        return {self.hash: 0}

    def rows(self, sample_indices: ArrayLike) -> NDArray[np.void]:
        """Return the rows of some samples, of type `SAMPLE`; their labels are those of the file, so use `labels`."""
        indices = np.asarray(sample_indices)
        if indices.ndim == 1 and len(indices) and (np.diff(indices) == 1).all():  # a slice copies nothing
            return self.samples[int(indices[0]) : int(indices[-1]) + 1]
        return self.samples[indices]

    def folder_of(self, sample_index: int) -> Path:
        """Return the folder of the dataset that has a sample."""
        return self.folder

    def path_of(self, shard: int) -> Path:
        """Return where a local shard is."""
        return self.folder / self.shards[shard].name

    def url_of(self, shard: int) -> str:
        """Return the URL of a shard; empty if it is local."""
        return f"{self.location.rstrip('/')}/{self.shards[shard].name}" if self.location else ""

    def place_of(self, sample_index: int) -> tuple[Path, int]:
        """Return the local file that holds a sample's image, and its first byte there."""
        return self.path_of(int(self.shard_of(sample_index))), int(self.samples["offset"][sample_index])

    def check_bytes(self, sample_index: int, data: bytes) -> None:
        """Refuse bytes that are not the sample's; those of `local_shards` are hashed as a whole instead."""

    def local_shards(self) -> list[tuple[Path, str]]:
        """Return the shards that lie here, each with the SHA-256 of its content."""
        return [(self.path_of(k), shard.sha256) for k, shard in enumerate(self.shards) if not self.url_of(k)]

    def shard_of(self, sample_indices: ArrayLike) -> NDArray[np.int64]:
        """Return the index of the shard that holds each sample."""
        return np.searchsorted(self._ends, sample_indices, side="right")

    def member(self, sample_index: int) -> str:
        """Return the name of a sample's image in its tar.

        Raises:
            DataError: The file of the names was changed.
        """
        start = int(self.samples["name"][sample_index])
        last = sample_index + 1 == self.num_samples
        stop = len(self._names) if last else int(self.samples["name"][sample_index + 1])
        name = self._names[start:stop].tobytes()
        try:
            return name.decode()
        except UnicodeDecodeError:
            raise DataError(
                f"{self.folder / NAMES}: the name of sample {sample_index}, {name[:40]!r}, is not UTF-8; convert again"
            ) from None

    def key(self, sample_index: int) -> str:
        """Return WebDataset's key of a sample: `sample_key` of its member."""
        return sample_key(self.member(sample_index))


def read_manifest(folder: Path, kind: type[Manifest] = Manifest) -> Manifest:
    """Open the dataset of shards in `folder`; `opening.open_dataset` opens folders of images too.

    Raises:
        DataError: The manifest is missing or damaged, or a local tar is missing or has another size.
    """
    folder = Path(folder)
    path = folder / HEADER
    try:
        raw = read_regular(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise DataError(f"{path} cannot be read ({error.strerror}); give the folder of a dataset") from None
        if any(folder.glob("*.tar")):
            make = f"its tars have no manifest yet; make it with `python -m pipeline.data convert tars {folder}`"
        else:
            make = "there are no shards; `python -m pipeline.data convert --help` shows how to make a dataset"
        raise DataError(f"{path} does not exist: {make}") from None
    try:
        header = json.loads(raw)
        if header["version"] != VERSION:
            raise DataError(
                f"{path} has version {str(header['version'])[:20]}, this code reads {VERSION}; convert again"
            )
        check_regular(folder / NAMES)
        names = np.memmap(folder / NAMES, np.uint8, "r") if header["num_samples"] else np.zeros(0, np.uint8)
        empty = not header["num_samples"]
        samples = np.zeros(0, SAMPLE) if empty else open_table(folder / SAMPLES, SAMPLE, header["samples_sha256"])
        manifest = kind(folder, header, _identity(header), samples, names)
        problem = _problem(manifest, header)
    except (KeyError, TypeError, ValueError, OSError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is damaged ({reason}); convert again or restore it") from None
    if problem:
        raise DataError(f"{path} {problem}; convert again or restore the files it describes")
    if not manifest.location:
        check_sizes(manifest)
    return manifest


def check_sizes(manifest: Manifest) -> None:
    """Check that every local shard exists with the size that the manifest states.

    Raises:
        DataError: One does not.
    """
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


def write_manifest(
    folder: Path,
    classes: Sequence[str],
    indices: Sequence[ShardIndex],
    location: str = "",
    member_rules: Mapping[str, Any] | None = None,
    kind: type[Manifest] = Manifest,
) -> Manifest:
    """Write the three files, the header last, so that a manifest that can be read is complete.

    Args:
        folder: Folder of the manifest, and of the shards unless `location` is given.
        classes: Names of the classes; empty if no sample has a label.
        indices: The scanned shards, in order of name.
        location: URL of the shards, if they are elsewhere.
        member_rules: How the members of the tars were read, if not in the usual way; `verify` needs it.
        kind: What is returned.
    """
    samples = np.zeros(sum(index.shard.count for index in indices), SAMPLE)
    for field, values in (
        ("offset", [offset for index in indices for offset in index.offsets]),
        ("length", [length for index in indices for length in index.lengths]),
        ("label", [label for index in indices for label in index.labels]),
    ):
        samples[field] = values
    members = [member.encode() for index in indices for member in index.members]
    samples["name"] = np.cumsum([0, *(len(member) for member in members)])[:-1]
    header: dict[str, Any] = {
        "version": VERSION,
        "location": location,
        "num_samples": len(samples),
        "samples_sha256": write_table(folder / SAMPLES, samples),
        "names_sha256": replace_bytes(folder / NAMES, b"".join(members)),
        "classes": list(classes),
        "shards": [asdict(index.shard) for index in indices],
    }
    if member_rules:
        header["member_rules"] = dict(member_rules)
    replace_text(folder / HEADER, json.dumps(header, indent=1) + "\n")
    return read_manifest(folder, kind)


def read_image(manifest: Manifest, sample_index: int) -> bytes:
    """Return the stored bytes of one image of a local dataset; training uses `streaming.reader.Reader`.

    Raises:
        DataError: The shards are remote, or the image cannot be read.
    """
    if url := manifest.url_of(int(manifest.shard_of(sample_index))):
        raise DataError(f"a shard of {manifest} is at {url}; copy the shards here to read images")
    path, start = manifest.place_of(sample_index)
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(int(manifest.rows(sample_index)["length"]))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it") from None
    manifest.check_bytes(sample_index, data)
    return data


def _identity(header: dict[str, Any]) -> str:
    """Return the SHA-256 of the header without its location; the header holds the checksums of everything else."""
    content = {name: value for name, value in header.items() if name != "location"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _problem(manifest: Manifest, header: dict[str, Any]) -> str:
    """Return what contradicts itself in a manifest whose checksums hold; empty if nothing does."""
    samples, shards = manifest.samples, manifest.shards
    if not isinstance(header["classes"], list) or not all(isinstance(name, str) for name in header["classes"]):
        return "has no list of class names"
    if not is_text("".join(header["classes"])):
        return "has a class name that is not Unicode text"
    if samples.dtype != SAMPLE or samples.ndim != 1:
        return "has a sample table of another form"
    if not shards or not len(samples):
        return "describes no samples"
    if len(samples) != header["num_samples"] or len(samples) != sum(shard.count for shard in shards):
        return f"counts {header['num_samples']} samples, but its table has {len(samples)}"
    for shard in shards:
        if shard.count < 0 or not is_file_name(shard.name):
            return f"lists a shard named {shard.name[:40]!r}, which does not lie in the dataset's folder"
    if len({shard.name for shard in shards}) != len(shards):
        return "lists a shard twice"
    if manifest.location and manifest.location.split("://")[0] not in manifest.locations:
        return f"has its shards at {manifest.location!r}, which is neither here nor at {', '.join(manifest.locations)}"
    sizes = np.array([shard.size for shard in shards]).astype(np.uint64)
    bounds = (manifest.num_name_bytes, len(header["classes"]))
    return check_table(manifest.folder / SAMPLES, samples, header["samples_sha256"], sizes, manifest._ends, bounds)
