"""A teacher from timm by its weights file: equal to timm's own, and refused in a sentence where it does not fit."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config import validate
from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.card import Preprocessing
from pipeline.exports.teacher_input import TeacherInput
from pipeline.exports.timm_teacher import timm_input, timm_teacher
from pipeline.models.__main__ import main
from pipeline.ops.torchvision_cpu import allow_torchvision
from stages.configs.distill import DistillConfig

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


PIXELS = torch.rand(2, 3, 40, 40)


def prepared(preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return (PIXELS - mean) / std


def test_a_teacher_sees_its_own_normalisation_and_size() -> None:
    student = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    own = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.4, 0.3))
    network = nn.Conv2d(3, 4, 3)
    for size in ((40, 40), (24, 48)):
        expected = prepared(own)
        if size != (40, 40):
            expected = F.interpolate(expected, size, mode="bicubic", antialias=True, align_corners=False)
        seen = TeacherInput(network, student, own, size)(prepared(student))
        torch.testing.assert_close(seen, network(expected), atol=1e-5, rtol=1e-5)
    same = TeacherInput(network, student, student, (40, 40))
    assert torch.equal(same(prepared(student)), network(prepared(student)))


def test_the_key_of_the_cache_follows_what_the_teacher_sees() -> None:
    a, b = (Preprocessing(mean=(m, 0.5, 0.5), std=(0.5, 0.5, 0.5)) for m in (0.5, 0.4))
    network, size = nn.Identity(), (8, 8)
    cases = [(a, a, size), (b, b, size), (a, b, size), (b, a, size), (a, a, (8, 9))]
    digests = {TeacherInput(network, student, own, shape).digest(student) for student, own, shape in cases}
    assert len(digests) == len(cases)
    assert TeacherInput(network, a, a, size).digest(a) == TeacherInput(nn.ReLU(), a, a, size).digest(a)


def test_timm_says_what_its_models_were_trained_on() -> None:
    known = timm_input("vit_tiny_patch16_224")
    assert known is not None
    assert (known.preprocessing.mean, known.preprocessing.std, known.image_size) == ((0.5,) * 3, (0.5,) * 3, (224, 224))
    usual = timm_input("regnety_160.deit_in1k")
    assert usual is not None
    assert usual.preprocessing.mean == (0.485, 0.456, 0.406)
    known = timm_input(NAME)
    assert known is not None
    assert known.image_size == (160, 160)
    assert timm_input("test_resnet.none") is None
    assert timm_input("no_such_model") is None


def test_a_students_images_are_prepared_as_timm_says_unless_the_config_does() -> None:
    """CLIP's mean and the size of DINOv2; `model.weights` is short for `weights.path`."""
    rest = {"run": {"experiment": "x"}, "optim": {"lr": 1}, "loop": {"steps": 9, "global_batch": 8}}

    def read(model: dict, **more) -> DistillConfig:
        return validate(DistillConfig, {**rest, "data": {"train": "d"}, **more, "model": model}, "here")

    clip = read({"name": "timm/vit_base_patch16_clip_quickgelu_224.openai", "weights": "clip.pt"})
    assert clip.weights is not None
    assert str(clip.weights.path) == "clip.pt"
    assert clip.data.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert clip.model.image_size == (224, 224)
    given = {"name": "timm/vit_small_patch14_dinov2", "image_size": 98, "weights": {"path": "a", "saw_labels": False}}
    mine = read(given, data={"train": "d", "mean": [0.5, 0.5, 0.5]})
    assert (mine.data.mean, mine.data.std, mine.model.image_size) == ((0.5,) * 3, (0.229, 0.224, 0.225), (98, 98))
    assert mine.weights is not None
    assert not mine.weights.saw_labels
    assert read({"name": "timm/vit_small_patch14_dinov2"}).model.image_size == (224, 224)  # from scratch: as ever
    with pytest.raises(ConfigError, match=r"model\.weights and weights are both given"):
        read({**given}, weights={"path": "b"})
