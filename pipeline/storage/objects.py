"""Objects of http(s), S3, Google and Azure storage, read by obstore in a process of its own.

obstore's threads do not survive a fork: a data worker that inherits them waits for ever. So a program never loads
obstore. `pipeline.storage.helper` starts this module as a process and asks it for ranges. The module loads neither
torch nor pydantic, so a helper takes some 30 MB and a tenth of a second.
"""

import functools
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.errors import DataError, EnvironmentProblem, PipelineError, first_line

CHUNK = 256 * 2**10
MAX_REQUEST = 64 * 2**10  # bytes
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
# Where a machine of each cloud asks for its own credentials: that is the last resort, so there are no others.
_METADATA = ("/latest/api/token", "/latest/meta-data", "169.254.170.2", "token request")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket; "
    "profiles of ~/.aws need: pip install boto3==1.44.8",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or "
    "AZURE_SKIP_SIGNATURE=true for a public container",
}
_worked: set[str] = set()  # stores that have answered: their credentials are good


class Transient(Exception):
    """An error after which another attempt may succeed."""


def serve(descriptor: int) -> None:
    """Answer requests until every process that holds the other end of the socket has ended."""
    control = socket.socket(fileno=descriptor)
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST, 1)
        if not request:
            os._exit(0)  # threads may still wait for servers
        threading.Thread(target=_answer, args=(json.loads(request), Connection(descriptors[0])), daemon=True).start()


def _answer(request: dict[str, Any], connection: Connection) -> None:
    """Send what the store yields and then None, or the error. A requester that closes its pipe wants no more."""
    with connection:
        try:
            for message in list_names(**request) if "start" not in request else read_range(**request):
                connection.send(message)
            connection.send(None)
        except BrokenPipeError:
            return
        except (PipelineError, Transient) as error:
            connection.send(error)
        except Exception as error:  # without an answer the other side would think that this process died
            connection.send(Transient(f"{type(error).__name__}: {first_line(error)}"))


def read_range(url: str, start: int, stop: int, timeout: float) -> Iterator[int | bytes]:
    """Yield the size of a whole object, and then its bytes [start, stop) as they arrive.

    Raises:
        Transient: The server is busy, or the connection broke.
        DataError: There is no such object, or it may not be read.
        EnvironmentProblem: This machine has no credentials for it.
    """
    import obstore

    root, path = _split(url)
    with _Refusing(url, root):
        found = obstore.get(_store(root, timeout), path, options={"range": (start, stop)})
        if found.range[0] != start:
            raise DataError(f"{url}: the server sent other bytes than it was asked for; copy the shards here")
        yield int(found.meta["size"])
        for data in found.stream(min_chunk_size=1):
            yield bytes(data)
    _worked.add(root)


def list_names(url: str, timeout: float) -> Iterator[str]:
    """Yield the names of the objects directly below a prefix, in order; plain http servers have no list."""
    import obstore

    root, path = _split(url)
    if urlsplit(url).scheme in ("http", "https"):
        raise DataError(
            f"{url}: a web server has no list of its files; name the tars, as in {url}/{{000000..000063}}.tar"
        )
    with _Refusing(url, root):
        found = obstore.list_with_delimiter(_store(root, timeout), path)
        yield from sorted(entry["path"].rpartition("/")[2] for entry in found["objects"])


def _split(url: str) -> tuple[str, str]:
    """Return the store of an object and the path in it; the query of a signed address stays with the store."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        query = f"?{parts.query}" if parts.query else ""
        return f"{parts.scheme}://{parts.netloc}{query}", unquote(parts.path.lstrip("/"))
    root, _, path = url.partition("://")[2].partition("/")
    return f"{parts.scheme}://{root}", path


@functools.cache
def _store(root: str, timeout: float) -> Any:
    """Return the store, with one attempt per request: the caller counts attempts, and knows which bytes it has."""
    from obstore.store import HTTPStore, from_url

    seconds = timedelta(seconds=timeout)
    options: dict[str, Any] = {
        "client_options": {"allow_http": True, "connect_timeout": seconds, "read_timeout": seconds, "timeout": "1 day"},
        "retry_config": {"max_retries": 0},
    }
    if root.startswith("http"):
        return HTTPStore(root, **options)
    if root.startswith("s3:") and (provider := _aws_profile()):
        options["credential_provider"] = provider
    return from_url(root, **options)


def _aws_profile() -> Any:
    """Return the credentials of ~/.aws, of a login or of a role, if boto3 is installed and finds any."""
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SKIP_SIGNATURE" in os.environ:
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except (ImportError, ValueError):
        return None


class _Refusing:
    """Turns obstore's errors into ours."""

    def __init__(self, url: str, root: str) -> None:
        self._url, self._root = url, root

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from obstore import exceptions

        url, text = self._url, first_line(error, 300) if error else ""
        no_bucket = "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error)
        if isinstance(error, FileNotFoundError) or no_bucket:
            missing = "bucket" if no_bucket else "object"
            raise DataError(f"{url}: the server answers 404, there is no such {missing}; check the address") from None
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            status = 403 if isinstance(error, exceptions.PermissionDeniedError) else 401
            raise DataError(
                f"{url}: the server answers {status}, it may not be read with these credentials{_how(url)}"
            ) from None
        if isinstance(error, exceptions.NotSupportedError):
            raise DataError(
                f"{url}: the server does not serve byte ranges; use a server that does, or copy the shards to a local folder"
            ) from None
        if not isinstance(error, exceptions.BaseError):
            return
        if self._root not in _worked and ("MissingAccount" in str(error) or any(m in text for m in _METADATA)):
            raise EnvironmentProblem(f"{url}: no credentials were found on this machine{_how(url)}") from None
        status_code = re.search(r"status code: (\d+)", text)
        if status_code and int(status_code[1]) not in _TRANSIENT_STATUS:
            raise DataError(f"{url}: the server answers {status_code[1]}; check the address") from None
        raise Transient(text) from None


def _how(url: str) -> str:
    kind = urlsplit(url).scheme
    return f"; {_CREDENTIALS.get('az' if kind.startswith('ab') else kind, 'check the address')}"
