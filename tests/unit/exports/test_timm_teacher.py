"""A teacher from timm by its weights file: equal to timm's own, and refused in a sentence where it does not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import HandoverError
from pipeline.exports.timm_teacher import timm_teacher
from pipeline.models.__main__ import main
from pipeline.ops.torchvision_cpu import allow_torchvision

NAME = "test_resnet.r160_in1k"  # timm's smallest model with weights: half a million


def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Make the hub's cache on disk as a download of NAME leaves it, with random weights, and switch the network off."""
    allow_torchvision()
    import timm
    from huggingface_hub import constants

    model = timm.create_model(NAME).eval()
    commit = "0" * 40
    repository = folder / f"models--timm--{NAME}"
    for name in ("refs", f"snapshots/{commit}"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    save_file(model.state_dict(), repository / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return model


def test_a_prefetched_file_gives_timms_model_and_a_missing_one_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = hub(tmp_path / "hub", monkeypatch), tmp_path / "weights"
    assert main(["prefetch", NAME, "--out", str(folder)]) == 0
    (file,) = folder.iterdir()
    assert capsys.readouterr().out == f"{file}\n"
    assert file.name == f"{NAME}.safetensors"
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(timm_teacher(NAME, file, 1000, (64, 64))(x), source(x))
    with pytest.raises(HandoverError, match="is no classifier of 7 classes"):
        timm_teacher(NAME, file, 7, (64, 64))
    absent = "test_vit.r160_in1k"
    with pytest.raises(HandoverError, match=f"no weights at .*{absent}.* prefetch {absent} --out {folder} where there"):
        timm_teacher(absent, folder / f"{absent}.safetensors", 1000, (160, 160))
    assert main(["prefetch", absent, "--out", str(folder)]) == 5
    assert f"the weights of {absent} could not be downloaded" in capsys.readouterr().err
    assert list(folder.iterdir()) == [file]
    assert main(["prefetch", "test_resnet.none", "--out", str(folder)]) == 2
    assert f"similar names: {NAME}" in capsys.readouterr().err
