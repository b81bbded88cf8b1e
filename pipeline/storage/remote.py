"""Bytes of a shard over http(s) or s3: in ranges, with time-outs, and with retries that resume at the byte."""

import contextlib
import logging
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, BinaryIO

from pipeline.config import choose
from pipeline.errors import DataError, EnvironmentProblem
from pipeline.storage.config import RemoteConfig

logger = logging.getLogger(__name__)

CHUNK = 256 * 2**10
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_jitter = random.SystemRandom()  # not the seeded generator: waiting must not change what is drawn


@dataclass(frozen=True)
class Stream:
    """The bytes of one range."""

    total: int  # bytes of the whole file
    read: Callable[[int], bytes]  # up to so many, as they come; empty at the end


class _Transient(Exception):
    """Worth another attempt."""


def fetch(url: str, start: int, stop: int, size: int | None, config: RemoteConfig, into: BinaryIO) -> None:
    """Append bytes [start, stop) of `url` to `into`; `size` is what the whole must have, None if it is not known.

    A connection that drops, stalls longer than the time-out or ends early is taken up where it ended, after a
    growing wait. DataError when `config.attempts` in a row bring no byte, or for what waiting cannot cure.
    """
    offset, failures = start, 0
    while offset < stop:
        try:
            with open_range(url, offset, stop, config.timeout_seconds) as stream:
                if size is not None and stream.total != size:
                    raise DataError(f"{url} has {stream.total} bytes, the manifest says {size}; it was changed")
                while offset < stop:
                    data = stream.read(min(CHUNK, stop - offset))
                    if not data:
                        raise _Transient(f"ended at byte {offset} of {stop}")
                    into.write(data)
                    offset, failures = offset + len(data), 0
        except (_Transient, OSError, HTTPException) as error:
            failures += 1
            if failures >= config.attempts:
                raise DataError(
                    f"{url}: no byte after {offset} in {failures} attempts ({error}); "
                    "check the network and the server, or raise remote.attempts"
                ) from None
            wait = min(config.backoff_seconds * 2 ** (failures - 1), 30.0) * _jitter.uniform(0.5, 1.0)
            logger.info("%s: %s; again from byte %d in %.1f s", url, error, offset, wait)
            time.sleep(wait)


def remote_size(url: str, config: RemoteConfig) -> int:
    """The size of a remote file in bytes."""
    for attempt in range(config.attempts):
        try:
            with open_range(url, 0, 1, config.timeout_seconds) as stream:
                return stream.total
        except (_Transient, OSError, HTTPException) as error:
            logger.info("%s: %s", url, error)
            time.sleep(min(config.backoff_seconds * 2**attempt, 30.0))
    raise DataError(f"{url} does not answer in {config.attempts} attempts; check the network and the server")


@contextlib.contextmanager
def open_range(url: str, start: int, stop: int, timeout: float) -> Iterator[Stream]:
    """A stream of bytes [start, stop); DataError for what no second attempt can cure."""
    openers: dict[str, Callable[..., Any]] = {"http": _open_http, "https": _open_http, "s3": _open_fsspec}
    with choose("kind of address", url.partition("://")[0], openers)(url, start, stop, timeout) as stream:
        yield stream


@contextlib.contextmanager
def _open_http(url: str, start: int, stop: int, timeout: float) -> Iterator[Stream]:
    """With Python's own client: fsspec's for http needs aiohttp, whose event loop does not survive a fork."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _TRANSIENT_STATUS:
            raise _Transient(f"status {error.code}") from None
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    with response:
        unit, _, total = response.headers.get("Content-Range", "").rpartition("/")
        if response.status != 206 or not unit.startswith(f"bytes {start}-") or not total.isdigit():
            raise DataError(f"{url}: the server does not serve byte ranges; use one that does, or copy the shards")
        yield Stream(int(total), response.read1)  # read would keep what came before a cut to itself


@contextlib.contextmanager
def _open_fsspec(url: str, start: int, stop: int, timeout: float) -> Iterator[Stream]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise EnvironmentProblem(f"{url}: {error}; pip install s3fs, or copy the shards") from None
    try:
        # One request for the range: no read-ahead, one block as long as the range.
        file = filesystem.open(path, "rb", cache_type="none", block_size=max(stop - start, CHUNK))
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{url}: {type(error).__name__}: {error}") from None
    with file:
        file.seek(start)
        yield Stream(file.size, file.read)
