"""Small real datasets: the digits, and photographs made of noise and gradients as JPEG."""

from pathlib import Path

import pytest

from pipeline.datasets.convert.digits import digits
from pipeline.datasets.convert.writer import convert
from pipeline.datasets.manifest import Manifest


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` and `test`, never written to by a test."""
    folder = tmp_path_factory.mktemp("digits")
    for name, source in zip(("train", "test"), digits(seed=0), strict=True):
        convert(source, folder / name, samples_per_shard=256)
    return folder


@pytest.fixture(scope="session")
def train(digits_folder: Path) -> Manifest:
    from pipeline.datasets.manifest import read_manifest

    return read_manifest(digits_folder / "train")
