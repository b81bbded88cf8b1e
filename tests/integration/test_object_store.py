"""Shards in an object store, read by real processes from moto's S3 server as from any endpoint of its own."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from pipeline.datasets.manifest import read_manifest
from tests import warm
from tests.conftest import Stages, free_port
from tests.unit.storage.flaky import serve
from tests.waiting import patience

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint(digits: Path) -> Iterator[str]:
    """The address of an S3 server whose bucket `digits` holds the tars of the training set."""
    url = f"http://127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", url.rpartition(":")[2]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + patience(60)
        while not answers(url) and time.monotonic() < deadline:
            time.sleep(0.1)
        client = boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="somebody",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="digits")
        for tar in sorted((digits / "train").glob("*.tar")):
            client.upload_file(str(tar), "digits", f"some/folder/{tar.name}")
        client.close()
        yield url
    finally:
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def index(source: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.data", "convert", "tars", source, "--out", str(out), "--processes", "2"]
    return warm.run(command, warm.ENVIRONMENT | {"AWS_EC2_METADATA_DISABLED": "true"} | environment)


def test_stage_1_from_s3_gives_the_weights_that_the_shards_on_disk_give(
    endpoint: str, chain: Stages, tmp_path: Path
) -> None:
    """The tars are listed, scanned through several processes, and then read by two data workers through the cache."""
    there = KEYS | {"AWS_ENDPOINT_URL": endpoint}
    done = index("s3://digits/some/folder", tmp_path / "far", **there)
    assert done.returncode == 0, done.stderr
    near = read_manifest(chain.digits / "train")
    assert read_manifest(tmp_path / "far").hash == near.hash
    more = [f"data.train={tmp_path / 'far'}", "run.experiment=far", "data.loader.workers=2"]
    command = chain.command("arm", *more, f"data.loader.remote.cache={tmp_path / 'cache'}")
    done = warm.run(command, warm.ENVIRONMENT | there)
    assert done.returncode == 0, done.stderr
    weights = [chain.runs / name / "arm" / "export" / "model.safetensors" for name in ("far", "smoke")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("source", "environment", "code", "sentence"),
    [
        ("s3://digits/some/folder/{000000..000000}.tar", KEYS, 0, ""),
        (
            "s3://digits/some/{000000..000001}.tar",
            KEYS,
            3,
            "some/000000.tar: the server answers 404, there is no such object",
        ),
        ("s3://digit/some/folder", KEYS, 3, "s3://digit/some/folder: the server answers 404, there is no such bucket"),
        ("s3://digits/some", KEYS, 3, "s3://digits/some has no .tar files"),
        ("s3://digits/some/folder", {"AWS_SKIP_SIGNATURE": "true"}, 3, "it may not be read with these credentials"),
        (
            "s3://digits/some/folder",
            {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"},
            5,
            "no credentials were found on this machine; set AWS_ACCESS_KEY_ID",
        ),
        ("gs://digits/some", {"GOOGLE_SKIP_SIGNATURE": "no"}, 5, "set GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://digits/some", {}, 5, "set AZURE_STORAGE_ACCOUNT_NAME"),
        ("ftp://digits/some", {}, 2, "unknown kind of address 'ftp'"),
    ],
)
def test_what_a_person_can_do_wrong_is_one_sentence_with_its_code(
    endpoint: str, tmp_path: Path, source: str, environment: dict[str, str], code: int, sentence: str
) -> None:
    done = index(source, tmp_path / "far", AWS_ENDPOINT_URL=endpoint, **environment)
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_that_answers_500_and_drops_connections_is_asked_again(digits: Path, tmp_path: Path) -> None:
    with serve(digits, ("500", "drop", "503", "")) as (url, log):
        source = "s3://train/{000000..000002}.tar"
        done = index(source, tmp_path / "far", AWS_ENDPOINT_URL=url, AWS_SKIP_SIGNATURE="true")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "far").shards == read_manifest(digits / "train").shards[:3]
    assert len(log.ranges) > 6
