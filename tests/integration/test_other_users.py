"""Files and folders of other users: each ends in one sentence with its exit code, or is done without."""

import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import warm
from tests.conftest import Stages
from tests.integration.test_resume import parents


class Other:
    """Runs commands without rights over files whose mode forbids it, and takes rights away."""

    def __init__(self) -> None:
        self.closed: list[tuple[Path, int]] = []

    def close(self, path: Path, mode: int = 0) -> None:
        self.closed.append((path, stat.S_IMODE(path.stat().st_mode)))
        path.chmod(mode)

    def run(self, *words: object, env=warm.ENVIRONMENT):
        command = [sys.executable, "-m", "tests.integration.without_rights", *map(str, words)]
        done = warm.run(command, env=env)
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture
def other() -> Iterator[Other]:
    made = Other()
    yield made
    for path, mode in reversed(made.closed):
        path.chmod(mode)


def stage(chain: Stages, name: str, *more: str) -> list[str]:
    return chain.command(name, f"run.experiment=others{len(more)}", *more)[2:]


def own_data(chain: Stages, folder: Path) -> list[str]:
    shutil.copytree(chain.digits, folder / "digits")
    data = [f"data.{name}={folder / 'digits' / name}" for name in ("train", "test")]
    return [*data, f"data.split={folder / 'digits/split.json'}", f"run.root={folder / 'runs'}"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train/000000.tar", "000000.tar cannot be"),
        ("test/000000.tar", "000000.tar cannot be"),
        ("train/manifest.json", "manifest.json cannot be read (Permission denied)"),
        ("train/manifest.samples.npy", "manifest.samples.npy"),
        ("train", "train/manifest.json cannot be read (Permission denied)"),
        ("split.json", "split.json cannot be read (Permission denied)"),
    ],
)
def test_data_that_cannot_be_read_ends_in_3(chain: Stages, tmp_path: Path, other: Other, name: str, said: str) -> None:
    more = own_data(chain, tmp_path)
    other.close(tmp_path / "digits" / name)
    done = other.run(*stage(chain, "arm", *more))
    assert done.returncode == 3, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "fingerprint.safetensors"])
def test_an_export_that_cannot_be_read_ends_in_4(chain: Stages, tmp_path: Path, other: Other, name: str) -> None:
    export = tmp_path / "export"
    shutil.copytree(chain.runs / "smoke/arm/export", export)
    classifier = tmp_path / "classifier"
    shutil.copytree(chain.runs / "smoke/semi/export", classifier)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    other.close(export / name)
    other.close(classifier / name)
    done = other.run(*stage(chain, "distill", f"init_from={export}", f"run.root={tmp_path / 'runs'}"))
    assert done.returncode == 4, done.stderr
    done = other.run("pipeline.predict", classifier, tmp_path / "x.png")
    assert done.returncode == 4, done.stderr


@pytest.mark.parametrize("home", ["", "/nonexistent", "closed", "read-only"])
def test_a_home_that_cannot_be_used_is_done_without(chain: Stages, tmp_path: Path, other: Other, home: str) -> None:
    env = {name: value for name, value in warm.ENVIRONMENT.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    env["TMPDIR"] = str(tmp_path)
    if home:
        env["HOME"] = home
    if home in ("closed", "read-only"):
        (tmp_path / home).mkdir()
        env["HOME"] = str(tmp_path / home)
        other.close(tmp_path / home, 0 if home == "closed" else 0o555)
    root = f"run.root={tmp_path / 'runs'}"
    done = other.run(*stage(chain, "distill", *parents(chain, "distill"), root), env=env)
    assert done.returncode == 0, done.stderr
