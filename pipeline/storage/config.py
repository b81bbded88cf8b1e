"""How bytes behind an address are fetched (torch-free)."""

from typing import Annotated

from pydantic import Field

from pipeline.config import Strict

Positive = Annotated[int, Field(gt=0)]


class RemoteConfig(Strict):
    """How shards behind http(s) or s3 are fetched; without effect on local ones."""

    cache: str = ""  # folder on a local disk, shared by the processes of a node
    cache_gb: Annotated[float, Field(gt=0.0)] = 50.0  # 10^9 bytes
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 30.0  # without a byte
    attempts: Positive = 8  # in a row that bring no byte
    backoff_seconds: Annotated[float, Field(ge=0.0)] = 0.5  # before the second attempt; doubles up to 30 s
