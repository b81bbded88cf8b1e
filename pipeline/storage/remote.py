"""Reading byte ranges of a shard over http(s) or s3, with timeouts, and with retries that resume at the last byte."""

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
_jitter = random.SystemRandom()  # not the seeded generator: a wait must not change other random numbers


@dataclass(frozen=True)
class Stream:
    """An open byte range.

    Attributes:
        total: Size of the whole file in bytes.
        read: Returns up to the given number of bytes, as they arrive; returns none at the end.
    """

    total: int
    read: Callable[[int], bytes]


class _Transient(Exception):
    """An error after which another attempt may succeed."""


def fetch(url: str, start: int, stop: int, size: int | None, config: RemoteConfig, into: BinaryIO) -> None:
    """Append bytes [start, stop) of a remote file to `into`.

    If a connection drops, stalls longer than the timeout or ends early, the next attempt resumes at the last byte,
    after a wait that grows.

    Args:
        url: The address of the file: http, https or s3.
        start: First byte.
        stop: One past the last byte.
        size: Expected size of the whole file in bytes, or None if it is unknown.
        config: Timeout, attempts and waits.
        into: Receives the bytes.

    Raises:
        DataError: If `config.attempts` in a row bring no byte, or another attempt cannot help.
        ConfigError: If the kind of address is unknown.
    """
    offset, failures = start, 0
    while offset < stop:
        try:
            with open_range(url, offset, stop, config.timeout_seconds) as stream:
                if size is not None and stream.total != size:
                    raise DataError(
                        f"{url} has {stream.total} bytes, the manifest says {size}; the file has changed, "
                        "so make the manifest again"
                    )
                while offset < stop:
                    data = stream.read(min(CHUNK, stop - offset))
                    if not data:
                        raise _Transient(f"the stream ended at byte {offset} of {stop}")
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
            logger.info("%s: %s; next attempt from byte %d in %.1f s", url, error, offset, wait)
            time.sleep(wait)


def remote_size(url: str, config: RemoteConfig) -> int:
    """Return the size of a remote file in bytes; DataError if the server does not answer."""
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
    """Open bytes [start, stop) of a remote file; DataError if another attempt cannot help."""
    openers: dict[str, Callable[..., Any]] = {"http": _open_http, "https": _open_http, "s3": _open_fsspec}
    with choose("kind of address", url.partition("://")[0], openers)(url, start, stop, timeout) as stream:
        yield stream


@contextlib.contextmanager
def _open_http(url: str, start: int, stop: int, timeout: float) -> Iterator[Stream]:
    """Use Python's own client: fsspec's http client needs aiohttp, whose event loop does not survive a fork."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _TRANSIENT_STATUS:
            raise _Transient(f"the server answers with status {error.code}") from None
        raise DataError(f"{url}: the server answers {error.code} {error.reason}") from None
    with response:
        unit, _, total = response.headers.get("Content-Range", "").rpartition("/")
        if response.status != 206 or not unit.startswith(f"bytes {start}-") or not total.isdigit():
            raise DataError(
                f"{url}: the server does not serve byte ranges; use a server that does, or copy the shards to a local folder"
            )
        yield Stream(int(total), response.read1)  # read() would lose the bytes that arrived before a cut


@contextlib.contextmanager
def _open_fsspec(url: str, start: int, stop: int, timeout: float) -> Iterator[Stream]:
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise EnvironmentProblem(f"{url}: {error}; pip install s3fs, or copy the shards") from None
    try:
        # No read-ahead and one block as long as the range give one request.
        file = filesystem.open(path, "rb", cache_type="none", block_size=max(stop - start, CHUNK))
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"{url}: {type(error).__name__}: {error}") from None
    with file:
        file.seek(start)
        yield Stream(file.size, file.read)
