"""Reading byte ranges of a shard behind an address, with timeouts, and with retries that resume at the last byte."""

import contextlib
import itertools
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.config import choose
from pipeline.errors import DataError
from pipeline.storage.config import KINDS, RemoteConfig
from pipeline.storage.helper import ask
from pipeline.storage.objects import Transient

logger = logging.getLogger(__name__)

_jitter = random.SystemRandom()  # not the seeded generator: a wait must not change other random numbers


@dataclass(frozen=True)
class Stream:
    """An open byte range.

    Attributes:
        total: Size of the whole file in bytes.
        data: The bytes of the range, as they arrive.
    """

    total: int
    data: Iterator[bytes]


def fetch(url: str, start: int, stop: int, size: int | None, config: RemoteConfig, into: BinaryIO) -> None:
    """Append bytes [start, stop) of a remote file to `into`.

    If a connection drops, stalls longer than the timeout or ends early, the next attempt resumes at the last byte,
    after a wait that grows.

    Args:
        url: The address of the file; `KINDS` are the kinds of addresses.
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
                for data in stream.data:
                    if offset + len(data) > stop:
                        raise DataError(
                            f"{url}: the server sent more bytes than it was asked for; copy the shards here"
                        )
                    into.write(data)
                    offset, failures = offset + len(data), 0
                if offset < stop:
                    raise Transient(f"the stream ended at byte {offset} of {stop}")
        except Transient as error:
            failures += 1
            _wait(f"{url}: no byte after {offset}", failures, error, config)


def _wait(what: str, failures: int, error: Transient, config: RemoteConfig) -> None:
    """Wait before the next attempt, twice as long each time; after the last one, raise the error."""
    if failures >= config.attempts:
        raise DataError(
            f"{what} in {failures} attempts ({error}); check the network and the server, or raise remote.attempts"
        ) from None
    wait = min(config.backoff_seconds * 2 ** (failures - 1), 30.0) * _jitter.uniform(0.5, 1.0)
    logger.info("%s: %s; next attempt in %.1f s", what, error, wait)
    time.sleep(wait)


def remote_size(url: str, config: RemoteConfig) -> int:
    """Return the size of a remote file in bytes.

    Raises:
        PipelineError: The file cannot be read, or the server does not answer.
    """
    for failures in itertools.count(1):
        try:
            with open_range(url, 0, 1, config.timeout_seconds) as stream:
                return stream.total
        except Transient as error:
            _wait(f"{url} does not answer", failures, error, config)
    raise AssertionError


def list_remote(url: str, config: RemoteConfig) -> list[str]:
    """Return the names of the files directly below an address of an object store, in order.

    Raises:
        PipelineError: The store cannot be read, or is a web server, which has no list.
    """
    _check_kind(url)
    for failures in itertools.count(1):
        try:
            with ask({"url": url, "timeout": config.timeout_seconds}) as answers:
                return list(answers)
        except Transient as error:
            _wait(f"{url} does not answer", failures, error, config)
    raise AssertionError


@contextlib.contextmanager
def open_range(url: str, start: int, stop: int, timeout: float) -> Iterator[Stream]:
    """Open bytes [start, stop) of a remote file; DataError if another attempt cannot help."""
    _check_kind(url)
    with ask({"url": url, "start": start, "stop": stop, "timeout": timeout}) as answers:
        yield Stream(next(answers), answers)


def _check_kind(url: str) -> None:
    choose("kind of address", url.partition("://")[0], KINDS)
