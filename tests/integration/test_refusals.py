"""What a person can get wrong: one sentence, the documented exit code, no stack trace, nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.conftest import ROOT, Stages
from tests.waiting import patience, wait_until

CONFIG = {
    "optim.lrr=1": "optim.lrr: unknown key; did you mean 'lr'?",
    "optim.lr=fast": "optim.lr = 'fast'",
    "optim.lr=-1e-3": "optim.lr = -0.001: input should be greater than 0",
    "loop.global_batch=18": "must be a multiple of data.loader.virtual_readers 4",
    "model.name=vim_tinny": "model name 'vim_tinny' is unknown; known: vim_tiny",
    "model.cluster_size=12": "image_size (32, 32) must be a multiple of cluster_size 12",
    "engine.micro_batch=7": "unequal micro-batches",
}


def assert_refused(done: subprocess.CompletedProcess[str], code: int, sentence: str) -> None:
    assert done.returncode == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("override", "sentence"), CONFIG.items())
def test_a_wrong_value_ends_in_2(stages: Stages, override: str, sentence: str) -> None:
    assert_refused(stages.run("arm", "run.experiment=refused", override), 2, sentence)
    assert not (stages.runs / "refused").exists()


def test_a_wrong_value_is_refused_before_torch_is_loaded(stages: Stages) -> None:
    command = stages.command("arm", "optim.lrr=1")
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert " torch\n" not in done.stderr
    assert "deepspeed" not in done.stderr


def test_an_unknown_stage_or_config_lists_what_there_is(stages: Stages) -> None:
    unknown = subprocess.run(
        [sys.executable, "-m", "stages", "smi", "configs/semi/smoke.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(unknown, 2, "unknown stage 'smi'; known: semi")
    absent = subprocess.run(
        [sys.executable, "-m", "stages", "semi", "configs/semi/smok.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert_refused(absent, 2, "configs/semi/smok.yaml does not exist; there are")


def test_processes_that_do_not_divide_the_batch_end_in_2_before_any_starts(stages: Stages) -> None:
    assert_refused(stages.run("arm", "run.experiment=refused", nproc=3), 2, "multiple of the 3 processes")


def test_no_shards_end_in_3(stages: Stages, tmp_path: Path) -> None:
    assert_refused(stages.run("arm", "run.experiment=refused", f"data.train={tmp_path}"), 3, str(tmp_path))


def test_a_manifest_that_does_not_match_its_tars_ends_in_3(stages: Stages, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "train", tmp_path / "train")
    shard = sorted((tmp_path / "train").glob("*.tar"))[0]
    with shard.open("ab") as file:
        file.write(b"x")
    assert_refused(stages.run("arm", "run.experiment=refused", f"data.train={tmp_path / 'train'}"), 3, shard.name)


def test_a_split_of_another_dataset_ends_in_3(stages: Stages, digits: Path) -> None:
    assert_refused(
        stages.run("arm", "run.experiment=refused", f"data.train={digits / 'test'}"), 3, "was made for another dataset"
    )


def test_half_an_environment_ends_in_5(stages: Stages) -> None:
    from tests.conftest import ENVIRONMENT

    done = warm.run(stages.command("arm", "run.experiment=half"), env=ENVIRONMENT | {"RANK": "0"})
    assert_refused(done, 5, "the environment gives RANK but not WORLD_SIZE")


def test_a_run_folder_that_cannot_be_written_ends_in_5(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = stages.run("arm", f"run.root={tmp_path / 'file'}")
    assert_refused(done, 5, "cannot be written")


def test_divergence_ends_in_6_and_leaves_nothing_that_is_not_finite(stages: Stages) -> None:
    done = stages.run("arm", "run.experiment=wild", "optim.lr=1e30", "optim.clip_norm=0", "optim.warmup_steps=0")
    assert_refused(done, 6, "by step")
    assert json.loads((stages.runs / "wild" / "arm" / "status.json").read_text())["state"] == "failed"


def test_a_rank_that_is_killed_ends_the_others_in_7(stages: Stages) -> None:
    import os
    import signal

    import psutil

    process = warm.start(
        stages.command("arm", "run.experiment=widow", "loop.steps=5000", "data.loader.workers=1", nproc=2)
    )
    metrics = stages.runs / "widow" / "arm" / "metrics.jsonl"
    wait_until(metrics.exists, "the first logged step", 40, context=lambda: process.errors)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    everyone = psutil.Process(process.pid).children(recursive=True)
    workers = ranks[1].children()
    assert workers
    for worker in workers:
        worker.suspend()  # it cannot notice that its rank is gone
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert process.wait(patience(15)) == 7
    _, there = psutil.wait_procs(everyone, timeout=patience(3))
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in there)
    assert "was killed by SIGKILL" in process.errors
