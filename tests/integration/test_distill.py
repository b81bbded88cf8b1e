"""The second chain, in real processes: ARM, fine-tuned Vision Mamba, distilled EfficientViM, stage 3; and what stage 2 keeps."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.exports.card import WEIGHTS, Card
from pipeline.exports.export import load_export
from pipeline.train.checkpoint import complete
from tests import warm
from tests.conftest import Stages
from tests.integration.test_resume import parents


def run(stages: Stages, stage: str, *more: str, nproc: int = 1) -> Path:
    """The smoke config of the second chain, to its end; the folder of its run."""
    teacher = [f"teacher.export={stages.runs / 'smoke/distill/export'}"] if stage == "distill" else []
    command = stages.command(stage, *teacher, *more, nproc=nproc, config="smoke_efficientvim")
    done = warm.run(command)
    assert done.returncode == 0, done.stderr
    name = next((m.split("=")[1] for m in reversed(more) if m.startswith("run.experiment=")), "smoke-efficientvim")
    return stages.runs / name / stage


@pytest.fixture(scope="module")
def taught(chain: Stages) -> Path:
    return run(chain, "distill")


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_the_second_chain_runs_to_stage_3(chain: Stages, taught: Path) -> None:
    card = Card.read(taught / "export")
    assert card.model.name == "efficientvim_nano_dist"
    assert [p.role for p in card.lineage.parents] == ["teacher"]
    assert card.lineage.parents[0].weights_sha256 == Card.read(chain.runs / "smoke/distill/export").weights_sha256
    assert not card.more_labels_than_claimed
    semi = run(chain, "semi")
    model, last = load_export(semi / "export")
    assert last.lineage.parents[0].weights_sha256 == card.weights_sha256
    assert last.model == card.model
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert set(json.loads((semi / "evaluation.json").read_text())["models"]) >= {"student", "teacher"}


def test_what_is_exported_is_the_average_of_weights_and_statistics(taught: Path) -> None:
    """Decay 0.9 over 8 steps: the running mean, 0 at the start, is an average of averages, far from the student's own."""
    export = load_file(taught / "export" / "model.safetensors")
    saved = load_file(next(iter(sorted(complete(taught / "checkpoints")[0].glob("shards_*")))))
    name = "patch_embed.conv.0.norm.running_mean"
    own, average = saved[f"buffer/{name}@0"], saved[f"buffer/task.{name}@0"]
    assert torch.equal(export[name], average)
    assert not torch.allclose(own, average)
    assert own.abs().sum() > average.abs().sum()


def test_a_resumed_run_with_batch_norm_is_the_uninterrupted_one_bit_for_bit(chain: Stages, taught: Path) -> None:
    name = "run.experiment=smoke-efficientvim-resumed"
    folder = run(chain, "distill", name)
    before = load_file(folder / "export" / WEIGHTS)
    assert all(torch.equal(v, load_file(taught / "export" / WEIGHTS)[k]) for k, v in before.items())
    # As if killed after step 6: the later checkpoint and the export never were.
    shutil.rmtree(folder / "export")
    for path in complete(folder / "checkpoints"):
        if path.name > "step_00000006":
            shutil.rmtree(path)
    run(chain, "distill", name)
    after = load_file(folder / "export" / WEIGHTS)
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_two_processes_train_with_the_statistics_of_the_whole_batch(chain: Stages, taught: Path) -> None:
    """Without mixing, whose draws differ by rank, the losses are those of one process to rounding."""
    quiet = ["mix={}", "loop.steps=4", "optim.cooldown_steps=0"]
    one = run(chain, "distill", "run.experiment=bn-one", *quiet)
    two = run(chain, "distill", "run.experiment=bn-two", *quiet, nproc=2)
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)


def test_a_second_run_does_not_ask_the_teacher_again(chain: Stages, tmp_path: Path) -> None:
    kept = f"teacher.cache={tmp_path / 'kept'}"
    short = ["loop.steps=4", "optim.cooldown_steps=0"]
    first = run(chain, "distill", "run.experiment=kept-one", kept, *short)
    (file,) = (tmp_path / "kept").glob("*.sqlite")

    def predictions() -> list[tuple[int, int]]:
        with contextlib.closing(sqlite3.connect(file)) as database:
            return database.execute("SELECT count(*), max(rowid) FROM predictions").fetchall()

    assert predictions() == [(4 * 16, 4 * 16)]
    second = run(chain, "distill", "run.experiment=kept-two", kept, *short)
    assert predictions() == [(4 * 16, 4 * 16)]
    assert losses(second) == losses(first)


def test_mesa_adds_the_averages_predictions_from_its_step_on(chain: Stages) -> None:
    folder = run(chain, "distill", "run.experiment=mesa", "teacher=null", "mesa={start: 0.5}", "optim.cooldown_steps=0")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/mesa" in row] == [5, 6, 7, 8]


def test_a_fresh_classifier_is_drawn_as_the_config_says(chain: Stages) -> None:
    """A rate that moves nothing leaves the draw in the export."""
    still = [*parents(chain, "distill"), "loop.steps=1", "optim={lr: 1e-300, weight_decay: 0}"]
    for name, given, std in (("usual", "null", 0.02), ("small", "2e-5", 2e-5)):
        folder = chain.complete("distill", *still, f"run.experiment=head-{name}", f"head_std={given}")
        head = load_file(folder / "export" / WEIGHTS)["head.weight"]
        assert float(head.std()) == pytest.approx(std, rel=0.15), name


def test_batch_norms_of_processes_of_their_own_are_those_of_micro_batches(chain: Stages) -> None:
    """Two processes without synchronisation have the losses of two micro-batches, with it those of the whole batch."""
    model = ["init_from=null", "model={name: efficientvim_nano}", "loop.steps=3"]

    def losses_of(name: str, *more: str, nproc: int = 1) -> list[float]:
        return losses(chain.complete("distill", *model, f"run.experiment=norms-{name}", *more, nproc=nproc))

    whole, parts = losses_of("whole"), losses_of("parts", "engine.micro_batch=8")
    assert max(abs(a - b) for a, b in zip(whole, parts, strict=True)) > 1e-3
    assert losses_of("own", "engine.sync_batch_norm=false", nproc=2) == pytest.approx(parts, rel=1e-5)
    assert losses_of("shared", nproc=2) == pytest.approx(whole, rel=1e-5)


def test_a_teacher_may_give_targets_to_unlabelled_images(chain: Stages) -> None:
    """As many steps, three times the images; a run without a split has none to offer."""
    folder = run(chain, "distill", "run.experiment=unlabelled", "teacher.unlabelled_ratio=2", "loop.steps=5")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])
    assert row["train/teacher_loss"] > 0
    assert not Card.read(folder / "export").more_labels_than_claimed
    more = ["run.experiment=without-a-split", "teacher.unlabelled_ratio=2", "data.split=null"]
    command = chain.command("distill", *more, config="smoke_efficientvim")
    refused = warm.run(command)
    assert refused.returncode == 2
    assert "there are no unlabelled samples in" in refused.stderr


def test_guessed_labels_teach_alike_on_one_process_and_on_two(chain: Stages) -> None:
    """Rank 0 guesses for all; without a split there is nothing to guess."""
    more = ["guess={ratio: 2}", *parents(chain, "distill")]
    alone = chain.complete("distill", "run.experiment=guess1", *more)
    together = chain.complete("distill", "run.experiment=guess2", *more, nproc=2)
    assert losses(together) == pytest.approx(losses(alone), rel=2e-4)
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    taught = [row["train/guess_loss"] for row in rows if "train/guess_loss" in row]
    assert len(taught) == 8
    assert taught[-1] < taught[0]
    done = chain.run("distill", "run.experiment=guess3", *more, "data.split=null")
    assert done.returncode == 2
    assert "unlabelled" in done.stderr


def test_a_resnet_of_timm_from_scratch_goes_through_both_stages_as_fixmatch(chain: Stages) -> None:
    """The student labels its own weak views; the average, batch norms' statistics included, is what stage 3 exports."""
    name = "run.experiment=fixmatch-resnet"
    small = "model={name: timm/resnet18, image_size: 32, options: {layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}}"
    chain.complete("distill", name, "init_from=null", small, "loop.steps=4", "loop.save_every=4")
    fixmatch = ["pseudo.labeller=student", "ema.buffers=average", "ema.mode=ema", "ema.base_decay=0.5", "ema.pull=0"]
    semi = chain.complete("semi", name, *fixmatch, "loop.steps=4", "loop.save_every=4")
    model, card = load_export(semi / "export")
    assert card.model.name == "timm/resnet18"
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    average, student = (load_file(semi / folder / WEIGHTS) for folder in ("export", "export-student"))
    assert not torch.equal(average["bn1.running_mean"], student["bn1.running_mean"])
