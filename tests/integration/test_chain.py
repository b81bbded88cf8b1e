"""The three stages one after another, in real processes: losses, lineage, reuse, and what a parent must be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy.special import softmax

from pipeline.config import load_config
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.splits import read_split
from pipeline.evaluate.calibration import calibrate
from pipeline.evaluate.predictions import collect_logits
from pipeline.exports.card import Card
from pipeline.exports.export import load_export
from pipeline.identity import identity
from pipeline.streaming.loader import evaluation_batches
from pipeline.streaming.transforms import eval_views
from stages import SPECS
from stages.check import check
from tests.conftest import Stages
from tests.golden.write import FOLDER, losses


@pytest.mark.parametrize("stage", SPECS)
def test_losses_are_the_golden_ones(chain: Stages, stage: str) -> None:
    golden = json.loads((FOLDER / f"{stage}.json").read_text())
    found = losses(chain.runs / "smoke" / stage, stage)
    assert len(found) == len(golden)
    for got, want in zip(found, golden, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_a_second_start_says_what_is_done_and_does_nothing(chain: Stages) -> None:
    weights = chain.runs / "smoke" / "semi" / "export" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    for nproc, more in ((1, []), (2, []), (1, ["data.test=nowhere"])):
        done = chain.run("semi", *more, nproc=nproc)
        assert done.returncode == 0
        assert ("note: data.test cannot be read" in done.stderr) == bool(more)
        assert "complete already, its export is reused" in done.stdout
    assert weights.stat().st_mtime_ns == before


def test_every_export_names_its_parent_its_data_and_the_labels_it_has_seen(chain: Stages) -> None:
    cards = {stage: Card.read(chain.runs / "smoke" / stage / "export") for stage in SPECS}
    assert cards["arm"].labels_seen == ()
    assert cards["distill"].lineage.parents[0].weights_sha256 == cards["arm"].weights_sha256
    assert cards["semi"].lineage.parents[0].weights_sha256 == cards["distill"].weights_sha256
    split = cards["semi"].lineage.split
    assert [seen.split for seen in cards["semi"].labels_seen] == [split]
    assert [seen.split for seen in cards["distill"].labels_seen] == [split]
    assert not cards["semi"].more_labels_than_claimed


def test_the_run_folder_tells_what_was_run(chain: Stages) -> None:
    folder = chain.runs / "smoke" / "semi"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["command"].startswith("python -m stages semi configs/semi/smoke.yaml")
    assert {"commit", "packages", "world_size", "cpu_count"} <= set(environment)
    assert "unlabelled_ratio: 2" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    assert list((folder / "tb").glob("events*"))
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    assert {name: m["samples"] for name, m in models.items()} == {"student": 400, "teacher": 400}
    assert {"top1", "head", "medium", "tail", "per_class"} <= set(models["teacher"])


@pytest.mark.parametrize("stage", SPECS)
def test_the_config_in_a_run_folder_starts_an_equal_run(chain: Stages, stage: str) -> None:
    spec, saved = SPECS[stage], chain.runs / "smoke" / stage / "config.yaml"
    begun = load_config(spec.config, Path(f"configs/{stage}/smoke.yaml"), chain.overrides())
    again = load_config(spec.config, saved, [])
    assert identity(again) == identity(begun)
    check(again, 1)
    assert "num_classes: 1000" not in saved.read_text(), "the data gives the classes, not the default"


def test_stage_3_is_calibrated_by_its_labels_and_by_what_it_started_from(chain: Stages) -> None:
    """The temperature of the card is that of `calibrate` on logits which this test computes from both exports."""
    config = load_config(SPECS["semi"].config, chain.runs / "smoke" / "semi" / "config.yaml", [])
    data = config.data
    manifest = read_manifest(Path(data.train))
    held_out = read_split(Path(data.split), manifest).subset("validation")
    cpu, logits, cards = torch.device("cpu"), {}, {}
    for stage in ("distill", "semi"):
        model, cards[stage] = load_export(chain.runs / "smoke" / stage / "export")
        size = cards[stage].model.image_size
        views = eval_views(size, mean=data.mean, std=data.std, view=data.view, decoding=data.decoding)
        batches = evaluation_batches(manifest, held_out, batch_size=50, rank=0, world_size=1, views=views, device=cpu)
        labels, logits[stage] = collect_logits(model, batches, cpu)
    start = softmax(logits["distill"] / cards["distill"].temperature, axis=1)
    with_start, without = calibrate(logits["semi"], labels, start), calibrate(logits["semi"], labels)
    assert cards["semi"].temperature == pytest.approx(with_start.temperature, rel=1e-4)
    assert cards["semi"].temperature != pytest.approx(without.temperature, rel=1e-4)


class TestParents:
    def test_a_missing_parent_is_named_with_the_command_that_makes_it(self, chain: Stages) -> None:
        for nproc in (1, 2):
            done = chain.run("semi", "run.experiment=orphan", nproc=nproc)
            assert done.returncode == 4
            assert "no export at" in done.stderr
            assert "make stage-2" in done.stderr
            assert "Traceback" not in done.stderr
            assert not (chain.runs / "orphan").exists()

    def test_a_flipped_byte_is_refused_before_any_work(self, chain: Stages, tmp_path: Path) -> None:
        parent = tmp_path / "export"
        shutil.copytree(chain.runs / "smoke" / "distill" / "export", parent)
        weights = parent / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
        done = chain.run("semi", "run.experiment=flipped", f"init_from={parent}")
        assert done.returncode == 4
        assert "is damaged" in done.stderr

    def test_a_pretrainer_cannot_feed_stage_3(self, chain: Stages) -> None:
        done = chain.run("semi", "run.experiment=skipped", f"init_from={chain.runs / 'smoke/arm/export'}")
        assert done.returncode == 4
        assert "stage semi needs a classifier as its init_from" in done.stderr

    def test_another_shape_is_refused(self, chain: Stages) -> None:
        done = chain.run(
            "distill", "run.experiment=wide", f"init_from={chain.runs / 'smoke/arm/export'}", "model.embed_dim=48"
        )
        assert done.returncode == 4
        assert "model.embed_dim = 32, this config 48" in done.stderr

    def test_a_parent_that_saw_more_labels_is_refused_or_marked(self, chain: Stages, digits: Path) -> None:
        """Stage 3 on one seed's tenth, from a parent trained on another's."""
        from pipeline.data import main

        other = digits / "other.json"
        main(
            [
                "split",
                str(digits / "train"),
                "--out",
                str(other),
                *"--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 7".split(),
            ]
        )
        more = ["run.experiment=leaky", f"init_from={chain.runs / 'smoke/distill/export'}", f"data.split={other}"]
        done = chain.run("semi", *more)
        assert done.returncode == 4
        assert "has seen labels outside this stage's" in done.stderr
        folder = chain.complete("semi", *more, "allow_more_labels=true", "loop.steps=4")
        card = Card.read(folder / "export")
        assert card.more_labels_than_claimed
        assert len(card.labels_seen) == 2

    def test_a_teacher_that_saw_more_labels_is_refused(self, chain: Stages, digits: Path) -> None:
        teacher = f"teacher={{export: {chain.runs / 'smoke/semi/export'}}}"
        more = ["run.experiment=taughtmore", f"init_from={chain.runs / 'smoke/arm/export'}", teacher]
        done = chain.run("distill", *more, f"data.split={digits / 'other.json'}")
        assert done.returncode == 4
        assert "has seen labels outside this stage's" in done.stderr

    def test_a_teacher_of_other_images_sees_them_as_its_own(self, chain: Stages) -> None:
        teacher = f"teacher={{export: {chain.runs / 'smoke/semi/export'}}}"
        images = ["model.image_size=48", "data.mean=[0.4,0.4,0.4]", "data.std=[0.3,0.3,0.3]"]
        done = chain.run(
            "distill",
            "run.experiment=larger",
            "init_from=null",
            teacher,
            *images,
            "loop.steps=2",
            "optim.warmup_steps=0",
        )
        assert done.returncode == 0, done.stderr
        assert "the teacher sees images of 32 x 32 pixels, mean (0.5, 0.5, 0.5)" in done.stdout + done.stderr


def test_stage_2_learns_from_a_teacher_of_timm(chain: Stages, tmp_path: Path) -> None:
    """A real timm model with a weights file; its labels are nobody's, so the result is marked or refused."""
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=10).state_dict(), weights)
    teacher = f"teacher={{timm: mobilenetv3_small_050, weights: {weights}, kind: hard}}"
    more = ["run.experiment=timm", f"init_from={chain.runs / 'smoke/arm/export'}", teacher, "loop.steps=4"]
    assert "set allow_more_labels=true" in chain.run("distill", *more).stderr
    absent = chain.run("distill", *more, "allow_more_labels=true", "teacher.weights=nowhere.safetensors")
    assert absent.returncode == 4
    assert "nothing is downloaded" in absent.stderr
    sized = ["allow_more_labels=true", "teacher.image_size=[64,64]"]
    done = chain.run("distill", *more, *sized)
    assert done.returncode == 0, done.stderr
    assert "the teacher sees images of 64 x 64 pixels, mean (0.485, 0.456, 0.406)" in done.stdout + done.stderr
    card = Card.read(chain.complete("distill", *more, *sized) / "export")
    assert card.more_labels_than_claimed
    assert "mobilenetv3_small_050" in [seen.split for seen in card.labels_seen]


def test_stage_2_learns_from_a_teacher_of_ours(chain: Stages) -> None:
    teacher = f"teacher={{export: {chain.runs / 'smoke/semi/export'}, kind: soft, weight: 0.5, temperature: 2.0}}"
    folder = chain.complete("distill", "run.experiment=taught", f"init_from={chain.runs / 'smoke/arm/export'}", teacher)
    card = Card.read(folder / "export")
    assert [p.role for p in card.lineage.parents] == ["init_from", "teacher"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/teacher_loss"] > 0 for row in rows if "train/loss" in row)
