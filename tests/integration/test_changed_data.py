"""Images that change places inside the shards of a run, while the manifest, the sizes and the times stay as they were."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.datasets.manifest import read_manifest
from pipeline.train.checkpoint import complete
from tests.conftest import Stages
from tests.integration.test_resume import parents, start_and_signal


def exchange_two_images(folder: Path, shard: int = 0) -> Path:
    """Exchange two images of one size and two classes in the bytes of a shard, twice to undo it; return the shard."""
    manifest = read_manifest(folder)
    path, before = manifest.path_of(shard), manifest.path_of(shard).stat()
    own = np.flatnonzero(manifest.shard_of(np.arange(manifest.num_samples)) == shard)
    rows, labels = manifest.rows(own), manifest.labels[own]
    first, second = next(
        (i, j)
        for i in range(len(own))
        for j in range(i)
        if rows["length"][i] == rows["length"][j] and labels[i] != labels[j]
    )
    content = bytearray(path.read_bytes())
    spans = [slice(o, o + n) for o, n in ((int(rows["offset"][k]), int(rows["length"][k])) for k in (first, second))]
    content[spans[0]], content[spans[1]] = content[spans[1]], content[spans[0]]
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


def own_data(chain: Stages, tmp_path: Path) -> list[str]:
    shutil.copytree(chain.digits, tmp_path / "digits")
    data = [f"data.{name}={tmp_path / 'digits' / name}" for name in ("train", "test")]
    return [*data, f"data.split={tmp_path / 'digits/split.json'}", f"run.experiment={tmp_path.name}"]


@pytest.mark.parametrize(("dataset", "nproc"), [("train", 1), ("train", 2), ("test", 1)])
def test_exchanged_images_are_found_by_the_hash_before_anything_is_kept(
    chain: Stages, tmp_path: Path, dataset: str, nproc: int
) -> None:
    more = own_data(chain, tmp_path)
    path = exchange_two_images(tmp_path / "digits" / dataset, shard=int(dataset == "train"))
    done = chain.run("arm", *more, "loop.save_every=1", nproc=nproc)
    assert done.returncode == 3, done.stderr
    assert f"{path} has the size but not the content that its manifest states" in done.stderr
    assert "Traceback" not in done.stderr
    run = chain.runs / tmp_path.name / "arm"
    assert not complete(run / "checkpoints")
    assert not (run / "export").exists()


def test_images_exchanged_between_two_starts_end_the_second_and_put_back_change_nothing(
    chain: Stages, tmp_path: Path
) -> None:
    more = [*own_data(chain, tmp_path), *parents(chain, "distill"), "loop.save_every=2", "loop.keep_checkpoints=100"]
    start_and_signal(chain, "distill", *more, number=signal.SIGKILL, after_steps=5)
    run = chain.runs / tmp_path.name / "distill"
    before = complete(run / "checkpoints")
    path = exchange_two_images(tmp_path / "digits/train")
    done = chain.run("distill", *more)
    assert done.returncode == 3, done.stderr
    assert str(path) in done.stderr
    assert before
    assert complete(run / "checkpoints") == before
    assert exchange_two_images(tmp_path / "digits/train") == path
    chain.complete("distill", *more)
    weights = "export/model.safetensors"
    assert (run / weights).read_bytes() == (chain.runs / "smoke/distill" / weights).read_bytes()
