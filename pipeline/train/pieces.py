"""Where the numbers of a checkpoint lie: which file holds which elements of which parameter.

A tensor of a checkpoint is named "KIND/NAME@START": the elements of the flattened parameter NAME from START on. Each rank reads
the headers of its share of the files and all share what they found. So a rank opens, beside those, only files with elements
that it owns, and the number of files that it opens does not grow with the number of ranks.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import HandoverError


class Piece(NamedTuple):
    """Some elements of one kind of one parameter.

    Attributes:
        kind: master, a moment, the name of an average, or buffer.
        name: The parameter.
        start: The first element, counted in the flattened parameter.
        numel: The number of elements.
        file: The name of the file that holds them.
    """

    kind: str
    name: str
    start: int
    numel: int
    file: str

    @property
    def key(self) -> str:
        """The name of the tensor in its file."""
        return f"{self.kind}/{self.name}@{self.start}"


def piece_of(key: str, numel: int, file: str) -> Piece:
    """Return the piece that a tensor of a checkpoint is.

    Raises:
        ValueError: The key has another form.
    """
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    if not (kind and name and start.isdecimal() and start.isascii() and len(start) < 16):
        raise ValueError(f"it has a tensor named {key[:60]!r}")
    # Interned, so that each name travels once among the thousands of pieces that ZeRO-3 makes.
    return Piece(sys.intern(kind), sys.intern(name), int(start), numel, file)


class Pieces:
    """All pieces of one checkpoint, and a reader of their elements.

    Args:
        path: The checkpoint's folder.
        pieces: What its files hold, from all ranks.

    Attributes:
        bytes_read: Bytes of the elements that have been read.
    """

    def __init__(self, path: Path, pieces: Iterable[Piece]) -> None:
        self.path = path
        self._of: dict[tuple[str, str], list[Piece]] = {}
        for piece in pieces:
            self._of.setdefault((piece.kind, piece.name), []).append(piece)
        for found in self._of.values():
            found.sort(key=lambda piece: (piece.start, piece.numel))
        self._files: dict[str, Any] = {}
        self.bytes_read = 0

    @property
    def opened(self) -> set[str]:
        """Names of the files that have been opened to read elements."""
        return set(self._files)

    def holding(self, kind: str, name: str, start: int, numel: int) -> list[tuple[Piece, int, int]]:
        """Find the pieces that together are a range of a parameter.

        Args:
            kind: What is asked for.
            name: The parameter.
            start: Its first element.
            numel: Number of elements.

        Returns:
            Each piece with the first and the last element (exclusive) that is taken from it.

        Raises:
            HandoverError: Elements are missing.
        """
        taken, found, stop = [], start, start + numel
        for piece in self._of.get((kind, name), ()):
            low, high = max(piece.start, found), min(piece.start + piece.numel, stop)
            if low < high and low == found:
                taken.append((piece, low, high))
                found = high
        if found != stop:
            raise HandoverError(f"{self.path} lacks {stop - found} of {numel} elements of {kind} of {name}")
        return taken

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Read elements (numel,) of a saved parameter; the arguments and errors are those of `holding`."""
        out = torch.empty(numel)
        for piece, low, high in self.holding(kind, name, start, numel):
            if piece.file not in self._files:
                self._files[piece.file] = safe_open(self.path / piece.file, framework="pt")
            elements = self._files[piece.file].get_slice(piece.key)[low - piece.start : high - piece.start]
            out[low - start : high - start] = elements
            self.bytes_read += 4 * (high - low)
        return out
