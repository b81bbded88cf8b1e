"""Several datasets as one: their samples in the order given, their classes united by name.

The joint view copies no table and has no `samples`: `rows` looks up each sample in the dataset that has it. The datasets
lie where they lie, some here and some behind a URL.
"""

import functools
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.datasets.config import Opening
from pipeline.datasets.manifest import SAMPLE, Manifest
from pipeline.datasets.opening import USUAL, open_dataset
from pipeline.errors import DataError


class JointManifest(Manifest):
    """Datasets that are read as one. Sample indices run through the datasets in the order given.

    Args:
        parts: The datasets.
        classes: Names of the classes, which the labels then are indices into. None = the names of all datasets, in the
            order in which they first appear; a dataset without classes adds none.

    Raises:
        DataError: The same dataset is given twice, or a dataset has a class that is not in `classes`.
    """

    def __init__(self, parts: Sequence[Manifest], classes: tuple[str, ...] | None = None) -> None:
        self.parts = tuple(parts)
        hashes = [part.hash for part in self.parts]
        if len(set(hashes)) < len(hashes):
            twice = next(part for part in self.parts if hashes.count(part.hash) > 1)
            raise DataError(f"{twice} is given twice, or the same dataset as a copy; name each dataset once")
        # One dataset with its classes in another order is still that dataset.
        self.hash = hashes[0] if len(hashes) == 1 else _sha256({"datasets": hashes})
        self.folder = self.parts[0].folder
        self.location = ", ".join(dict.fromkeys(part.location for part in self.parts if part.remote))
        self.classes = unite([part.classes for part in self.parts]) if classes is None else classes
        self.shards = tuple(shard for part in self.parts for shard in part.shards)
        self._ends = np.cumsum([shard.count for shard in self.shards])
        self._sample_ends = np.cumsum([part.num_samples for part in self.parts])
        self._shard_ends = np.cumsum([len(part.shards) for part in self.parts])
        self._new_labels = [_translation(part, self.classes) for part in self.parts]

    def __reduce__(self) -> tuple[Any, ...]:
        return JointManifest, (self.parts, self.classes)

    def __str__(self) -> str:
        return ", ".join(map(str, self.folders))

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the datasets."""
        return tuple(folder for part in self.parts for folder in part.folders)

    @property
    def num_samples(self) -> int:
        """How many samples all datasets have."""
        return int(self._sample_ends[-1])

    @property
    def first_index(self) -> dict[str, int]:
        """The first sample index of each dataset, and of all of them together, by hash."""
        starts = [0, *self._sample_ends.tolist()[:-1]]
        return {self.hash: 0} | {part.hash: start for part, start in zip(self.parts, starts, strict=True)}

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """(num_samples,) joint class of each sample; -1 where it is unknown."""
        # The last entry of each translation is -1, so that it is what label -1 is translated to.
        pairs = zip(self._new_labels, self.parts, strict=True)
        return np.concatenate([new[part.samples["label"]] for new, part in pairs])

    def rows(self, sample_indices: ArrayLike) -> NDArray[np.void]:
        """Return the rows of some samples, of type `SAMPLE`; their labels are those of the files, so use `labels`."""
        indices = np.asarray(sample_indices)
        if indices.ndim == 0:
            part, row = self._local(int(indices))
            return part.rows(row)
        if len(indices) and (np.diff(indices) >= 0).all():  # sorted: each dataset has a slice of them
            cuts = np.searchsorted(indices, self._sample_ends).tolist()
            starts = [0, *self._sample_ends.tolist()]
            found = np.empty(indices.shape, SAMPLE)
            for part, begin, end, start in zip(self.parts, [0, *cuts], cuts, starts, strict=False):
                if begin < end:
                    found[begin:end] = part.rows(indices[begin:end] - start)
            return found
        found, owners = np.empty(indices.shape, SAMPLE), np.searchsorted(self._sample_ends, indices, side="right")
        for number, part in enumerate(self.parts):
            own = owners == number
            found[own] = part.rows(indices[own] - (self._sample_ends[number] - part.num_samples))
        return found

    @property
    def remote(self) -> bool:
        """Whether some shards are behind a URL."""
        return any(part.remote for part in self.parts)

    def folder_of(self, sample_index: int) -> Path:
        """Return the folder of the dataset that has a sample."""
        part, row = self._local(sample_index)
        return part.folder_of(row)

    def path_of(self, shard: int) -> Path:
        """Return where a local shard is."""
        part, own = self._owner(shard)
        return part.path_of(own)

    def url_of(self, shard: int) -> str:
        """Return the URL of a shard; empty if it is local."""
        part, own = self._owner(shard)
        return part.url_of(own)

    def place_of(self, sample_index: int) -> tuple[Path, int]:
        """Return the local file that holds a sample's image, and its first byte there."""
        part, row = self._local(sample_index)
        return part.place_of(row)

    def check_bytes(self, sample_index: int, data: bytes) -> None:
        """Refuse bytes that are not the sample's."""
        part, row = self._local(sample_index)
        part.check_bytes(row, data)

    def local_shards(self) -> list[tuple[Path, str]]:
        """Return the shards of all datasets that lie here, each with the SHA-256 of its content."""
        return [shard for part in self.parts for shard in part.local_shards()]

    def member(self, sample_index: int) -> str:
        """Return the name of a sample's image in its tar."""
        part, row = self._local(sample_index)
        return part.member(row)

    def _local(self, sample_index: int) -> tuple[Manifest, int]:
        number = int(np.searchsorted(self._sample_ends, sample_index, side="right"))
        part = self.parts[number]
        return part, sample_index - int(self._sample_ends[number]) + part.num_samples

    def _owner(self, shard: int) -> tuple[Manifest, int]:
        number = int(np.searchsorted(self._shard_ends, shard, side="right"))
        part = self.parts[number]
        return part, shard - int(self._shard_ends[number]) + len(part.shards)


def read_manifests(folders: Sequence[Path], opening: Opening = USUAL) -> Manifest:
    """Open one dataset, or several as one.

    Args:
        folders: Their folders.
        opening: How folders of images without shards are opened.

    Raises:
        DataError: A dataset cannot be opened, or is given twice.
    """
    if len(folders) == 1:
        return open_dataset(folders[0], opening)
    with ThreadPoolExecutor(len(folders)) as pool:  # hashing the tables releases the interpreter's lock
        return JointManifest(list(pool.map(open_dataset, folders, [opening] * len(folders))))


def with_classes(manifest: Manifest, classes: tuple[str, ...]) -> Manifest:
    """Return a dataset with its labels counted in `classes`, for example a test set in the classes of a training set.

    Raises:
        DataError: The dataset has a class that is not among them.
    """
    if manifest.classes == classes:
        return manifest
    return JointManifest(manifest.parts if isinstance(manifest, JointManifest) else [manifest], classes)


def unite(names: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Unite lists of class names: each name once, where it first appears. Names that differ only in Unicode form are one."""
    found: dict[str, str] = {}
    for name in (name for some in names for name in some):
        found.setdefault(_same(name), name)
    return tuple(found.values())


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _translation(part: Manifest, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Return (number of classes of the dataset + 1,) the joint class of each of its classes, and -1 at the end."""
    known = {_same(name): number for number, name in enumerate(classes)}
    missing = [name for name in part.classes if _same(name) not in known]
    if missing:
        raise DataError(
            f"{part} has {len(missing)} classes that the training data does not have, the first: {missing[0]!r} (it has"
            f" {', '.join(classes[:4]) or 'none'}{', ...' if len(classes) > 4 else ''}); convert it again without them,"
            " or with the names of the training data"
        )
    return np.array([*(known[_same(name)] for name in part.classes), -1], np.int64)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
