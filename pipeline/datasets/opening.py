"""Open a dataset: a folder of shards, or a folder of images that nobody has converted.

A folder of images is read as the dataset that `convert` would make of it, with the same samples, order, labels and hash.
So a split, a run or a checkpoint of the one is good for the other. Each image is read once to find its place in those
shards and its SHA-256; the tars are not kept. What was found lies in the user's cache folder until a file changes.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.datasets.config import Opening
from pipeline.datasets.convert.classes import read_classes
from pipeline.datasets.manifest import HEADER, Manifest, ShardIndex, read_manifest, write_manifest
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.text import shown
from pipeline.decoding import DEFAULT, Decoding
from pipeline.errors import DataError, EnvironmentProblem
from pipeline.files import replace_text, replacing, user_cache
from pipeline.images import UnreadableImage, decode

if TYPE_CHECKING:
    from pipeline.datasets.convert.source import Files

logger = logging.getLogger(__name__)

FILES = "manifest.files.json"
USUAL = Opening()
_CHUNK = 64  # images in a job of `verify_files`


class ImageFolder(Manifest):
    """A folder of images as a dataset, read-only.

    Args:
        folder: Folder of the manifest, in the user's cache folder.
        header: The manifest's header.
        digest: Hash of the manifest.
        samples: (num_samples,) the table of samples, with their places in the shards that a conversion would write.
        names: Member names, end to end.
    """

    locations = ("file",)

    def __init__(self, folder: Path, header: dict[str, Any], digest: str, samples: Any, names: Any) -> None:
        super().__init__(folder, header, digest, samples, names)
        found = json.loads((folder / FILES).read_bytes())
        self.root = Path(found["root"])
        self._files: list[tuple[str, str]] = found["files"]

    def __reduce__(self) -> tuple[Any, ...]:
        return read_manifest, (self.folder, ImageFolder)

    def __str__(self) -> str:
        return str(self.root)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the images."""
        return (self.root,)

    @property
    def remote(self) -> bool:
        """The images are here."""
        return False

    def folder_of(self, sample_index: int) -> Path:
        """Return the folder of the images."""
        return self.root

    def url_of(self, shard: int) -> str:
        """Return an empty text: the images are here."""
        return ""

    def local_shards(self) -> list[tuple[Path, str]]:
        """Return nothing: there are no shards, and each image is checked when it is read."""
        return []

    def place_of(self, sample_index: int) -> tuple[Path, int]:
        """Return the file of a sample, and 0."""
        return self.root / self._files[sample_index][0], 0

    def check_bytes(self, sample_index: int, data: bytes) -> None:
        """Refuse bytes other than those that were there when the folder was opened."""
        name, sha256 = self._files[sample_index]
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(
                f"{self.root}/{shown(name)} has changed since the folder was opened; restore it, or start a run of the changed"
                " folder under another name"
            )


def open_dataset(folder: Path, opening: Opening = USUAL) -> Manifest:
    """Open the dataset in `folder`: its shards, or else its images.

    Images in sub-folders have these as classes, as `convert imagefolder` decides. The images of a flat folder have no label.

    Args:
        folder: The folder.
        opening: How its images are opened, if it has no shards.

    Raises:
        DataError: There are neither shards nor images, or some images cannot be read.
    """
    folder = Path(folder)
    try:
        images = not (folder / HEADER).exists() and folder.is_dir() and not any(folder.glob("*.tar"))
    except OSError:  # a closed folder
        images = False
    if not images:
        return read_manifest(folder)  # it says what is wrong
    from pipeline.datasets.convert.imagefolder import image_folder, plain_folder
    from pipeline.datasets.convert.scan import find_images

    names = find_images(folder, {})
    if not names:
        return read_manifest(folder)  # its error says how to make a dataset
    flat = all("/" not in name for name in names)
    classes = read_classes(opening.classes) if opening.classes else None
    source = plain_folder(folder, classes or ()) if flat else image_folder(folder, classes=classes)
    return _open_images(folder, source, "folder" if flat else "imagefolder", opening)


def _open_images(root: Path, source: "Files", kind: str, opening: Opening) -> ImageFolder:
    named = json.dumps(list(source.classes)).encode() if opening.classes else b""
    key = hashlib.sha256(os.fsencode(root.resolve()) + named).hexdigest()[:32]
    try:
        index = user_cache() / "folders" / key
        index.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(index.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentProblem(
            f"what is found in {root} cannot be kept in the cache folder of this user ({error.strerror}); make shards:"
            f" python -m pipeline.data convert {kind} {root} --out OUT"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process reads the images, the others wait for what it finds
        state = _state(source)
        if _is_current(index, state):
            with contextlib.suppress(DataError):  # the cache folder was damaged: what it holds can be found again
                manifest = read_manifest(index, ImageFolder)
                manifest.member(0)  # reads and checks the names
                return manifest  # type: ignore[return-value]
        _read_images(root, source, index, state, kind, opening, lock)
        if _state(source) != state:
            raise DataError(f"{root} changed while it was read; start the same command again")
        return read_manifest(index, ImageFolder)  # type: ignore[return-value]
    finally:
        os.close(lock)


def _state(source: "Files") -> str:
    """Return a digest that changes with the classes, and with the name, size or time of change of any file."""
    digest = hashlib.sha256(json.dumps([list(source.classes), list(source.labels)]).encode())
    for path in source.paths:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        except OSError:
            state = "absent"
        digest.update(os.fsencode(path) + b"\0" + state.encode() + b"\n")
    return digest.hexdigest()


def _is_current(index: Path, state: str) -> bool:
    try:
        return bool(json.loads((index / FILES).read_bytes())["state"] == state)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_images(root: Path, source: "Files", index: Path, state: str, kind: str, opening: Opening, lock: int) -> None:
    """Check all images and write what `ImageFolder` reads, whole or not at all."""
    from pipeline.datasets.convert.check import check_images, refusal
    from pipeline.datasets.convert.table import table
    from pipeline.datasets.convert.writer import cut_shards, keep_source_names

    processes = os.cpu_count() or 1
    decoding = Decoding(max_pixels=opening.max_pixels)
    if problems := dict(source.problems) | check_images(source, decoding, processes, lock):
        raise refusal(
            source, problems, f"or make shards without them: convert {kind} {root} --out OUT --skip-unreadable"
        )
    order, chunks = cut_shards(source, problems)
    _forget_missing(index.parent)
    with replacing(index, sync=False) as folder:
        folder.mkdir()
        jobs = [(chunk, folder / f"{k:06d}.tar") for k, chunk in enumerate(chunks)]
        work = functools.partial(_index_shard, source)
        found = list(run_parallel(work, jobs, processes, "images", [len(chunk) for chunk in chunks], [lock]))
        digests = [digest for _, some in found for digest in some]
        names = [os.path.relpath(source.paths[item], root) for item in order]
        files = {"root": str(root.resolve()), "state": state, "files": list(zip(names, digests, strict=True))}
        replace_text(folder / FILES, json.dumps(files) + "\n")
        address = f"file://{shown(str(root.resolve()))}"
        manifest = write_manifest(folder, source.classes, [shard for shard, _ in found], address, kind=ImageFolder)
        keep_source_names(source, manifest, order)
    lines = "\n  ".join(table(len(source.keys), source.left_out, {}))
    classes = f"{len(source.classes)} classes" if source.classes else "no classes"
    logger.warning("%s is read as it is, with %s:\n  %s", root, classes, lines)


def _forget_missing(indexes: Path) -> None:
    """Remove what was found in folders that are no longer there."""
    for path in indexes.glob(f"*/{FILES}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if not Path(json.loads(path.read_bytes())["root"]).exists():
                shutil.rmtree(path.parent)
                path.parent.with_suffix(".lock").unlink()


def _index_shard(source: "Files", job: tuple[list[int], Path]) -> tuple[ShardIndex, list[str]]:
    """Return the samples of a shard as a conversion writes it, and the SHA-256 of each image; the shard is removed."""
    from pipeline.datasets.convert.writer import write_shard

    path = job[1]
    shard = write_shard(source, 0, DEFAULT, job)
    with path.open("rb") as file:
        digests = []
        for offset, length in zip(shard.offsets, shard.lengths, strict=True):
            file.seek(offset)
            digests.append(hashlib.sha256(file.read(length)).hexdigest())
    path.unlink()
    return shard, digests


def verify_files(manifest: ImageFolder, processes: int, decoding: Decoding = DEFAULT) -> Iterator[str]:
    """Yield a sentence for each image that has changed, is missing or does not decode."""
    first = range(0, manifest.num_samples, _CHUNK)
    jobs = [range(start, min(start + _CHUNK, manifest.num_samples)) for start in first]
    for problems in run_parallel(functools.partial(_verify_images, manifest, decoding), jobs, processes, "images"):
        yield from problems


def _verify_images(manifest: ImageFolder, decoding: Decoding, sample_indices: Sequence[int]) -> list[str]:
    from pipeline.datasets.manifest import read_image

    problems = []
    for sample_index in sample_indices:
        try:
            decode(read_image(manifest, sample_index), decoding)
        except DataError as error:
            problems.append(str(error))
        except UnreadableImage as error:
            problems.append(f"{manifest.place_of(sample_index)[0]}: {error}")
    return problems
