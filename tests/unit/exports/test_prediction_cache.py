"""Teachers from timm by their weights file; answers kept on disk: asked once, through a kill, within their limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import EnvironmentProblem, HandoverError
from pipeline.exports.teachers import KeptAnswers, timm_teacher
from pipeline.models.__main__ import main
from pipeline.ops.torchvision_cpu import allow_torchvision
from tests.conftest import ENVIRONMENT, ROOT

CLASSES = 7


def network(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :CLASSES] * 3 - 1


def images(number: int, seed: int) -> Tensor:
    return torch.randn(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def keep(folder: Path, gigabytes: float = 1.0) -> KeptAnswers:
    return KeptAnswers(network, folder / "answers.sqlite", gigabytes=gigabytes)


def test_the_same_pixels_are_asked_once_whatever_batch_they_come_in(tmp_path: Path) -> None:
    first, x = keep(tmp_path), images(6, 0)
    assert torch.equal(first(x[:4]), network(x[:4]))
    assert torch.equal(first(x[[5, 2, 2, 0]]), network(x[[5, 2, 2, 0]]))
    assert first.asked == 5
    second = keep(tmp_path)
    assert torch.equal(second(x.flip(0)), network(x.flip(0)))
    assert second.asked == 1


ENDLESS = """
import itertools, sys
from pathlib import Path
from tests.unit.exports.test_teachers import images, keep
kept = keep(Path(sys.argv[1]))
for step in itertools.count():
    kept(images(64, step))
    print(step, flush=True)
"""


def test_a_second_writer_and_a_kill_leave_every_batch_whole(tmp_path: Path) -> None:
    """One process writes until it is killed in the middle, while this one writes and reads too."""
    own = keep(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for seed in range(10_000, 10_040):
        own(images(8, seed))
    for line in child.stdout:
        own(images(8, 20_000 + int(line)))
        if int(line) >= 40:
            break
    child.kill()
    told = int([line, *child.stdout.read().split()][-1])
    child.wait()
    child.stdout.close()
    later = keep(tmp_path)
    for step in range(told + 1):
        assert torch.equal(later(images(64, step)), network(images(64, step)))
    for seed in [*range(10_000, 10_040), *range(20_000, 20_041)]:
        assert torch.equal(later(images(8, seed)), network(images(8, seed)))
    assert later.asked == 0
    assert later._database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_file_ends_at_its_limit_and_the_answers_do_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = keep(tmp_path, gigabytes=2e-4)
    for seed in range(100):
        assert torch.equal(small(images(64, seed)), network(images(64, seed)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2e5
    assert len(caplog.records) == 1
    assert "cache_gb" in caplog.text
    again = keep(tmp_path, gigabytes=2e-4)
    again(images(64, 0))
    assert again.asked == 0


def test_memory_does_not_grow_with_what_is_kept(tmp_path: Path) -> None:
    """100 MB of answers; those of the last call and a cache of 32 MB are what may be held."""
    wide = KeptAnswers(lambda x: x.flatten(1).repeat(1, 256), tmp_path / "wide.sqlite", gigabytes=1)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for seed in range(4):
        wide(images(128, seed))
    before = resident()
    for seed in range(4, 20):
        wide(images(128, seed))
    assert (tmp_path / "wide.sqlite").stat().st_size > 100e6
    assert resident() - before < 48e6


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(HandoverError, match="delete it"):
        keep(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be opened"):
        keep(tmp_path / "file")


NAME = "test_resnet.r160_in1k"  # timm's own smallest with weights: half a million


def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The hub's cache on disk as it is after a download of NAME (with weights drawn here), and no network."""
    allow_torchvision()
    import timm
    from huggingface_hub import constants

    model = timm.create_model(NAME).eval()
    commit = "0" * 40
    repository = folder / f"models--timm--{NAME}"
    for part in ("refs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    save_file(model.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return model


def test_prefetched_weights_teach_and_what_cannot_be_had_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = hub(tmp_path / "hub", monkeypatch), tmp_path / "weights"
    assert main(["prefetch", NAME, "--out", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert capsys.readouterr().out == f"{file}\n"
    assert file.name == f"{NAME}.safetensors"
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(timm_teacher(NAME, file, 1000, (64, 64))(x), source(x))
    with pytest.raises(HandoverError, match="does not answer for 7 classes"):
        timm_teacher(NAME, file, 7, (64, 64))
    absent = "test_vit.r160_in1k"
    with pytest.raises(HandoverError, match=f"no weights at .*{absent}.* prefetch {absent} --out {folder} where there"):
        timm_teacher(absent, folder / f"{absent}.safetensors", 1000, (160, 160))
    assert main(["prefetch", absent, "--out", str(folder)]) == 5
    assert f"the weights of {absent} could not be downloaded" in capsys.readouterr().err
    assert list(folder.iterdir()) == [file]
    assert main(["prefetch", "test_resnet.none", "--out", str(folder)]) == 2
    assert f"near it: {NAME}" in capsys.readouterr().err
