"""Settings of remote reading (torch-free)."""

from pydantic import Field

from pipeline.config import Seconds, Strict

# What may stand before :// in an address: web servers, S3, Google storage, Azure storage.
KINDS = dict.fromkeys(("http", "https", "s3", "gs", "az", "abfs", "abfss"), True)


class RemoteConfig(Strict):
    """How shards behind http(s), s3, gs or az are fetched. It has no effect on local shards."""

    cache: str = Field(
        "",
        max_length=4000,
        description="Folder on a local disk where fetched shards are cached, shared by all processes of a node. "
        "Remote shards need one.",
    )
    cache_gb: float = Field(50.0, gt=0.0, le=10**9, description="Size limit of the cache in 10^9 bytes.")
    timeout_seconds: Seconds = Field(30.0, description="Seconds without a byte after which a connection is cut.")
    attempts: int = Field(
        8, gt=0, le=1000, description="Number of attempts in a row without a byte after which reading fails."
    )
    backoff_seconds: float = Field(
        0.5,
        ge=0.0,
        le=3600,
        description="Seconds before the second attempt; the wait doubles with each attempt, up to 30 s.",
    )
