"""What a config file may say about remote shards (torch-free)."""

from typing import Annotated

from pydantic import Field

from pipeline.config import Strict

Positive = Annotated[int, Field(gt=0)]


class RemoteConfig(Strict):
    """How shards behind http(s) or s3 are fetched; local shards ignore it."""

    cache: str = Field(
        "", description="folder on a local disk that keeps what was fetched; the processes of a node share it"
    )
    cache_gb: float = Field(50.0, gt=0.0, description="size to which the cache may grow, in GB (10^9 bytes)")
    timeout_seconds: float = Field(30.0, gt=0.0, description="seconds without a byte before a connection is given up")
    attempts: Positive = Field(8, description="attempts in a row that bring no byte before the run ends")
    backoff_seconds: float = Field(
        0.5, ge=0.0, description="seconds before the second attempt; the wait doubles up to 30 seconds"
    )
