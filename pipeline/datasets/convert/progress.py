"""What a folder of shards was made of, so that a conversion can be continued, and never over a changed source."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.datasets.convert.source import Source
from pipeline.datasets.manifest import HEADER
from pipeline.datasets.parallel import counted
from pipeline.datasets.text import shown
from pipeline.errors import DataError
from pipeline.files import replace_text

logger = logging.getLogger(__name__)

PLAN = "convert.json"
_AGAIN = "give another folder as --out, or delete this one"


@dataclass
class Progress:
    """The content of `convert.json`.

    Attributes:
        plan: Digest of the classes, keys, labels and options.
        content: Digest of the sizes of the source's files.
        shards: Digest of the source's files of each shard, with their times; empty when all shards are written.
        left_out: Kind of the problem of each item that was left out.
        names: What messages call each item.
    """

    plan: str
    content: str
    shards: list[str]
    left_out: Mapping[int, str]
    names: Sequence[str] = field(default=(), repr=False)

    @property
    def problems(self) -> dict[str, list[str]]:
        """The names of the items that were left out, by the kind of their problem."""
        found: dict[str, list[str]] = {}
        for item, kind in self.left_out.items():
            found.setdefault(kind, []).append(shown(self.names[item]) if self.names else str(item))
        return found

    @classmethod
    def read(cls, out: Path, names: Sequence[str]) -> "Progress | None":
        """Return what `out` says; None if nothing was begun there.

        Raises:
            DataError: `out` holds shards that no conversion made, or its `convert.json` is damaged.
        """
        path = out / PLAN
        filled = (out / HEADER).exists() or any(out.glob("*.tar"))
        try:
            stated: dict[str, Any] = json.loads(path.read_bytes())
            left_out = {int(item): str(kind) for item, kind in stated["left_out"].items()}
            return cls(stated["plan"], stated["content"], list(stated["shards"]), left_out, names)
        except FileNotFoundError:
            if filled:
                raise DataError(
                    f"{out} already holds shards that this command did not make; give another folder as --out"
                ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            if filled:
                raise DataError(f"{path} is damaged or of another version; {_AGAIN}") from None
        return None

    def check_finished(self, out: Path, plan: str, content: str) -> None:
        """Refuse a finished dataset of another source, of other options, or of files that have other sizes now."""
        if (self.plan, self.content) != (plan, content):
            raise DataError(f"{out} holds another conversion, or its source has changed since; {_AGAIN}")

    def begin(self, out: Path, before: "Progress | None", paths: Sequence[Path]) -> None:
        """Keep the whole shards of an earlier start whose files are unchanged, and write `convert.json`.

        Raises:
            DataError: `out` holds whole shards of another conversion.
        """
        if any(out.glob("*.tar")):
            if before is None or before.plan != self.plan or before.left_out != self.left_out:
                raise DataError(f"{out} holds another conversion, begun, or its source has changed since; {_AGAIN}")
            known = dict(zip(paths, before.shards, strict=False))
            stale = [p for p, digest in zip(paths, self.shards, strict=True) if p.exists() and known.get(p) != digest]
            for path in stale:
                path.unlink()
            if stale:
                logger.warning("files of the source have changed since: %d shards are written again", len(stale))
        self._write(out)

    def finish(self, out: Path) -> None:
        """Write that everything is there; what is left depends on the content of the source alone."""
        self.shards = []
        self._write(out)

    def _write(self, out: Path) -> None:
        left_out = {str(item): kind for item, kind in sorted(self.left_out.items())}
        fields = {"plan": self.plan, "content": self.content, "shards": self.shards, "left_out": left_out}
        replace_text(out / PLAN, json.dumps(fields) + "\n")


def plan_digest(source: Source, *options: int) -> str:
    """Return a digest that only a conversion of the same samples with the same options shares."""
    digest = hashlib.sha256(json.dumps([list(source.classes), *options]).encode())
    for key, label in zip(source.keys, source.labels, strict=True):
        digest.update(f"{key}\0{label}\n".encode())
    return digest.hexdigest()


def content_digest(source: Source) -> str:
    """Return a digest of the sizes of the source's files, which equal sources share."""
    return _hash(str(_state(path)[0]) for path in counted(source.files, "files", len(source.files)))


def shard_digests(source: Source, chunks: Sequence[Sequence[int]]) -> list[str]:
    """Return a digest per chunk of items, which changes when a file of its items changes.

    A source with fewer files than items, such as parquet, has one digest for all.
    """
    if len(source.files) != len(source.keys):
        whole = _hash(str(_state(path)) for path in source.files)
        return [whole] * len(chunks)
    files = source.files
    return [_hash(str(_state(files[item])) for item in chunk) for chunk in counted(chunks, "shards", len(chunks))]


def _hash(parts: Any) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _state(path: str) -> tuple[int, int, int]:
    """Return the size of a file, the time of its last modification and that of its last change; -1 where there is none.

    Programs set the time of modification at will, as `cp -p` and `rsync` do, but not that of the change.
    """
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1, -1
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
