"""A small ViT with a weights file in DINOv2's layout, frozen or with LoRA, through stages 2 and 3 in real processes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.exports.card import WEIGHTS, Card
from pipeline.exports.export import load_export
from pipeline.models import build_model
from pipeline.report import experiment as report
from pipeline.train.checkpoint import complete
from tests import warm
from tests.conftest import Stages

OPTIONS = {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "vit_small_patch14_reg4_dinov2"
MODEL = f"{{name: timm/{NAME}, image_size: 28, options: {json.dumps(OPTIONS)}, weights: %s}}"
# Views without randomness: the whole image.
PLAIN = "augment={crop_scale: [1.0, 1.0], crop_ratio: [1.0, 1.0], horizontal_flip: 0.0}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone for 42 px with registers, as its authors release one."""
    torch.manual_seed(3)
    model = build_model(f"timm/{NAME}", image_size=42, num_classes=0, options=OPTIONS).model
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), weights["pos_embed"]], 1)
    path = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(weights | {"mask_token": torch.zeros(1, 24)}, path)
    return path


def distill(stages: Stages, file: Path, name: str, kind: str, *more: str, nproc: int = 1) -> Path:
    given = [f"run.experiment={name}", "init_from=null", f"model={MODEL % file}", f"backbone.train={kind}"]
    return stages.complete("distill", *given, "allow_more_labels=true", *more, nproc=nproc)


def semi(stages: Stages, name: str, kind: str, *more: str, nproc: int = 1) -> Path:
    given = [f"run.experiment={name}", f"backbone.train={kind}", "allow_more_labels=true"]
    return stages.complete("semi", *given, *more, nproc=nproc)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_a_backbone_from_a_file_goes_through_both_stages_to_export_predict_and_report(
    stages: Stages, file: Path, kind: str, tmp_path: Path
) -> None:
    second = distill(stages, file, kind, kind)
    third = semi(stages, kind, kind)
    start, end = (load_file(folder / "export" / WEIGHTS) for folder in (second, third))
    model = build_model(f"timm/{NAME}", image_size=28, num_classes=10, options=OPTIONS)
    assert start.keys() == end.keys() == model.model.state_dict().keys()  # merged: no name of LoRA is left
    released = torch.load(file)
    changed = {k for k in released.keys() & end.keys() - {"pos_embed"} if not torch.equal(released[k], end[k])}
    linear = {f"blocks.{i}.{n}.weight" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert changed == (linear if kind == "lora" else set())
    assert not torch.equal(start["head.weight"], end["head.weight"])
    # What a checkpoint holds is what trains, the teacher's included.
    saved = load_file(next(complete(third / "checkpoints")[0].glob("shards_*")))
    names = {key.partition("/")[2].partition("@")[0] for key in saved}
    updates = {name.replace(".weight", f".lora_{x}") for name in linear for x in "ab"} if kind == "lora" else set()
    assert names == {f"model.{name}" for name in ("head.weight", "head.bias", *updates)}
    assert {key.partition("/")[0] for key in saved} == {"master", "exp_avg", "exp_avg_sq", "teacher"}
    card = Card.read(third / "export")
    assert card.more_labels_than_claimed
    assert load_export(third / "export")[0](torch.zeros(2, 3, 28, 28)).shape == (2, 10)
    Image.new("RGB", (30, 20)).save(tmp_path / "image.png")
    command = [sys.executable, "-m", "pipeline.predict", str(third / "export"), str(tmp_path / "image.png")]
    assert warm.run(command).returncode == 0
    if kind == "lora":  # a report draws for seconds
        page = report.run([stages.runs / kind], tmp_path / "report.html")
        assert "accuracy" in page.read_text().lower()


def test_a_resumed_run_with_lora_under_lyapema_is_the_uninterrupted_one_bit_for_bit(stages: Stages, file: Path) -> None:
    distill(stages, file, "lora-resumed", "lora")
    dropout = "backbone.lora={rank: 4, dropout: 0.1}"
    folder = semi(stages, "lora-resumed", "lora", dropout)
    before = {name: load_file(folder / name / WEIGHTS) for name in ("export", "export-student")}
    for name in before:
        shutil.rmtree(folder / name)
    for path in complete(folder / "checkpoints"):
        if path.name > "step_00000006":
            shutil.rmtree(path)
    semi(stages, "lora-resumed", "lora", dropout)
    for name, weights in before.items():
        after = load_file(folder / name / WEIGHTS)
        assert all(torch.equal(value, after[k]) for k, value in weights.items())


@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_train_a_backbone_as_one_does(stages: Stages, file: Path, zero: int) -> None:
    name = f"lora-zero{zero}"
    more = [f"engine.zero_stage={zero}", "loop.steps=4", "loop.save_every=4", "backbone.lora.targets=[qkv, fc1]"]
    one = distill(stages, file, f"{name}-one", "lora", "average={decay: 0.5}", *more)
    two = distill(stages, file, f"{name}-two", "lora", "average={decay: 0.5}", *more, nproc=2)
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    a, b = (load_file(folder / "export" / WEIGHTS) for folder in (one, two))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert torch.equal(a["blocks.1.attn.proj.weight"], torch.load(file)["blocks.1.attn.proj.weight"])


def test_cached_features_train_the_classifier_that_images_train(stages: Stages, file: Path, tmp_path: Path) -> None:
    """With one view and no randomness in it, image for image; kept on disk for the next run, by what they depend on."""
    kept = [PLAIN, "backbone.cached_views=1", f"backbone.cache={tmp_path / 'kept'}"]
    images = distill(stages, file, "images", "frozen", PLAIN)
    first = distill(stages, file, "cached", "frozen", *kept)
    assert losses(first) == pytest.approx(losses(images), rel=1e-5)
    a, b = (load_file(folder / "export" / WEIGHTS) for folder in (images, first))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-4) for k in a)
    (made,) = (tmp_path / "kept").iterdir()
    stamp = made.stat().st_mtime_ns
    again = distill(stages, file, "cached-again", "frozen", *kept, nproc=2)
    assert losses(again) == pytest.approx(losses(first), rel=1e-5)
    assert (made.stat().st_mtime_ns, len(list((tmp_path / "kept").iterdir()))) == (stamp, 1)
    views = [
        option.replace("cached_views=1", "cached_views=2").replace("1.0, 1.0], crop_r", "0.5, 1.0], crop_r")
        for option in kept
    ]
    distill(stages, file, "cached-views", "frozen", *views)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    third = semi(stages, "cached-views", "frozen", "backbone.cached_views=2")
    logged = set().union(*(json.loads(line) for line in (third / "metrics.jsonl").read_text().splitlines()))
    assert {"val/top1", "val/teacher_top1", "ssl/mask_rate", "pseudo/coverage"} <= logged


def test_layers_that_have_not_joined_lie_still(stages: Stages, file: Path) -> None:
    folder = distill(stages, file, "unfreezing", "whole", "optim.unfreeze_every=4")
    weights, released = load_file(folder / "export" / WEIGHTS), torch.load(file)
    assert torch.equal(weights["blocks.0.mlp.fc1.weight"], released["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(weights["blocks.1.mlp.fc1.weight"], released["blocks.1.mlp.fc1.weight"])


def test_what_contradicts_itself_is_refused_before_the_start(stages: Stages, file: Path) -> None:
    given = ["run.experiment=refused", "init_from=null", "allow_more_labels=true"]
    for more, sentence in (
        (["backbone.train=frozen"], "backbone.train=frozen keeps the backbone's weights, but none are given"),
        ([f"model={MODEL % file}", f"weights.path={file}"], "model.weights and weights are both given"),
        (
            [f"model={MODEL % file}", "backbone={train: frozen, cached_views: 1}", "mix.mixup=0.8"],
            "trains on features of the labelled images, but mix, teacher and guess need others",
        ),
    ):
        done = stages.run("distill", *given, *more)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
