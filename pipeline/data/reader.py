"""The bytes of a sample."""

import os
from collections import OrderedDict

from pipeline.data.manifest import Manifest
from pipeline.errors import DataError

MAX_OPEN_SHARDS = 64  # far under the usual limit of 1024 descriptors, with many workers on a node


class Reader:
    """Reads single samples of one dataset by offset; one per process."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, the least recently used first

    def read(self, position: int) -> bytes:
        """The image's bytes as stored; DataError if the shard no longer holds them."""
        sample = self.manifest.samples[position]
        shard = int(self.manifest.shard_of(position))
        offset, length = int(sample["offset"]), int(sample["length"])
        try:
            data = os.pread(self._descriptor(shard), length, offset)
        except OSError as error:
            data, reason = b"", f" ({error.strerror})"
        else:
            reason = ""
        if len(data) != length:
            path = self.manifest.folder / self.manifest.shards[shard].name
            raise DataError(f"{path}: {length} bytes at {offset} cannot be read{reason}; was the shard changed?")
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.manifest.folder / self.manifest.shards[shard].name, os.O_RDONLY)
        self._open.move_to_end(shard)
        return self._open[shard]
