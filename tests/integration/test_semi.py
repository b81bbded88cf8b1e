"""Stage 3's options in real runs: any backbone, baselines by config, and what each of them adds to a checkpoint."""

import json
import signal
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.train.schedules import half_cosine
from tests import warm
from tests.conftest import Stages
from tests.integration.test_resume import parents, start_and_signal


@pytest.fixture(scope="module")
def efficientvim(chain: Stages) -> Path:
    """Stage 2's export of a model with batch normalisation."""
    more = ["run.experiment=efficientvim", "init_from=null", "model={name: efficientvim_nano}", "loop.steps=4"]
    return chain.complete("distill", *more) / "export"


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def bytes_of(run: Path) -> list[bytes]:
    return [(run / folder / "model.safetensors").read_bytes() for folder in ("export", "export-student")]


@pytest.mark.soak  # the WRN below averages its statistics too
def test_averaged_statistics_of_another_backbone_survive_a_kill(chain: Stages, efficientvim: Path) -> None:
    more = [f"init_from={efficientvim}", "ema.buffers=average"]
    straight = chain.complete("semi", *more, "run.experiment=bn-straight")
    start_and_signal(chain, "semi", *more, "run.experiment=bn-killed", number=signal.SIGKILL, after_steps=5)
    assert bytes_of(chain.complete("semi", *more, "run.experiment=bn-killed")) == bytes_of(straight)
    teacher, student = (load_file(straight / name / "model.safetensors") for name in ("export", "export-student"))
    name = next(n for n in teacher if n.endswith("running_var"))
    assert not teacher[name].equal(student[name])


def test_a_wide_resnet_learns_by_sgd_and_survives_a_kill(chain: Stages) -> None:
    """Stages 2 and 3 of the digits; the loss falls, and a resume under another ZeRO stage has the momentum."""
    model = [
        "init_from=null",
        "model={name: wrn_28_2, depth: 10, widen: 1}",
        "optim={kind: sgd, lr: 0.03, weight_decay: 5e-4}",
    ]
    parent = chain.complete("distill", *model, "run.experiment=wrn", "loop.steps=16") / "export"
    losses = [row["train/loss"] for row in rows(parent.parent) if "train/loss" in row]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    more = [
        f"init_from={parent}",
        "optim={kind: sgd, lr: 0.03, schedule: cosine_7_16}",
        "ema={mode: ema, base_decay: 0.9, buffers: average}",
    ]
    straight = chain.complete("semi", *more, "run.experiment=wrn-straight")
    start_and_signal(chain, "semi", *more, "run.experiment=wrn-killed", number=signal.SIGKILL, after_steps=5)
    assert bytes_of(chain.complete("semi", *more, "run.experiment=wrn-killed")) == bytes_of(straight)
    teacher, student = (load_file(straight / name / "model.safetensors") for name in ("export", "export-student"))
    name = next(n for n in teacher if n.endswith("running_var"))
    assert not teacher[name].equal(student[name])


@pytest.mark.soak
def test_the_whole_wrn_28_2_trains_on_the_digits(chain: Stages) -> None:
    """Two steps of FixMatch from random weights, as in USB's configs."""
    more = [
        "init_from=null",
        "model={name: wrn_28_2}",
        "optim={kind: sgd, lr: 0.03, weight_decay: 5e-4, schedule: cosine_7_16}",
        "ema={mode: ema, base_decay: 0.999, warmup_steps: 0, buffers: average}",
        "pseudo={labeller: student, threshold: 0.95, weight: 1.0}",
        "unlabelled_ratio=1",
        "loop.steps=2",
        "loop.global_batch=4",
        "watched_samples=0",
        "data.test=null",
    ]
    run = chain.complete("semi", *more, "run.experiment=wrn-28-2")
    card = json.loads((run / "export" / "model.json").read_text())
    assert (card["model"]["depth"], card["model"]["widen"]) == (28, 2)
    student, average = (load_file(run / folder / "model.safetensors") for folder in ("export-student", "export"))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(value.numel() for name, value in student.items() if not name.endswith(statistics)) == 1_467_626
    assert not student["head.weight"].equal(average["head.weight"])


def test_ssmixup_is_refused_where_there_are_no_two_directions(chain: Stages, efficientvim: Path) -> None:
    done = chain.run("semi", f"init_from={efficientvim}", "run.experiment=refused", "ssmixup={}")
    assert done.returncode == 2
    assert "efficientvim_nano" in done.stderr
    assert "set ssmixup=null" in done.stderr


def test_the_released_semi_vim_survives_a_kill_on_any_backbone(chain: Stages, efficientvim: Path) -> None:
    released = ["ema={preset: released, pull: 0.01}", "ssmixup={axis: logits, nu: 1.0}", "pseudo.normalise=accepted"]
    more = [f"init_from={efficientvim}", *released, "optim.lr=1e-2"]
    straight = chain.complete("semi", *more, "run.experiment=released-straight")
    start_and_signal(chain, "semi", *more, "run.experiment=released-killed", number=signal.SIGKILL, after_steps=5)
    assert bytes_of(chain.complete("semi", *more, "run.experiment=released-killed")) == bytes_of(straight)


def test_the_logged_rate_is_the_one_that_a_step_used(chain: Stages) -> None:
    """At a rate that moves no weight V stays 0, so that every update rolls back and halves the rate of the next step."""
    still = ["optim={lr: 1e-300, weight_decay: 0}", "loop.steps=4", "ema={preset: released}"]
    run = chain.complete("semi", *parents(chain, "semi"), *still, "run.experiment=rolled-back")
    logged = [row["train/lr"] for row in rows(run) if "train/lr" in row]
    scheduled = [1e-300 * half_cosine(step / 4) for step in range(4)]
    assert logged == pytest.approx([rate / 2**k for k, rate in enumerate(scheduled)], rel=1e-12, abs=0)
    assert [row["ema/rollbacks"] for row in rows(run) if "ema/rollbacks" in row] == [1, 2, 3, 4]


def test_ssmixup_and_running_means_survive_a_kill_and_leave_no_trace_in_the_export(chain: Stages) -> None:
    remedies = ["ssmixup={}", "pseudo.thresholds=class_balanced", "pseudo.alignment=labelled", "optim.lr=1e-2"]
    more = [*parents(chain, "semi"), *remedies]
    straight = chain.complete("semi", *more, "run.experiment=mix-straight")
    start_and_signal(chain, "semi", *more, "run.experiment=mix-killed", number=signal.SIGKILL, after_steps=5)
    assert bytes_of(chain.complete("semi", *more, "run.experiment=mix-killed")) == bytes_of(straight)
    assert json.loads((straight / "export" / "model.json").read_text())["model"]["ssmixup"] is None
    newest = max((straight / "checkpoints").glob("step_*"))
    with safe_open(newest / "shards_00000.safetensors", "pt") as shards:
        strengths = [shards.get_tensor(k) for k in shards.keys() if k.startswith("master/") and ".nu@" in k]  # noqa: SIM118
    assert strengths
    assert all(nu.abs().item() > 0 for nu in strengths)  # it was learned


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("supervised", ["pseudo.weight=0", "ema.mode=ema"]),
        (
            "fixmatch",
            "pseudo.labeller=student logit_adjustment=1.0 data.loader.sampling=uniform ema.mode=ema".split(),
        ),
        (
            "semivit",
            ["mixup={pseudo: true, labelled_mixup: 0.8, labelled_cutmix: 1.0}", "pseudo.smoothing=0.1", "ema.mode=ema"],
        ),
        (
            "softmatch",
            "pseudo.thresholds=softmatch pseudo.alignment=uniform pseudo.aligned=confidence pseudo.momentum=0.9".split(),
        ),
        ("freematch", "pseudo.thresholds=freematch pseudo.fairness=0.05 pseudo.momentum=0.9".split()),
        ("weights", ["class_weights={kind: effective, beta: 0.9}", "data.loader.sampling=uniform"]),
        ("inverse", ["class_weights={kind: inverse}", "data.loader.sampling=uniform"]),
        ("both", ["ssmixup={axis: both, psi: self, nu: 0.5}", "pseudo.kind=soft", "pseudo.normalise=accepted"]),
    ],
)
def test_baselines_and_remedies_are_configs(chain: Stages, name: str, values: list[str]) -> None:
    run = chain.complete("semi", *parents(chain, "semi"), f"run.experiment={name}", "loop.steps=3", *values)
    logged = rows(run)
    assert ("ssl/mask_rate" in logged[0]) == (name != "supervised")
    last = logged[-1]
    assert {"val/top1", "val/teacher_top1", "val/ece"} <= last.keys()
    assert ("pseudo/coverage" in last) == (name != "supervised")


def test_a_balanced_head_survives_a_kill_and_is_the_exports_only_one(chain: Stages) -> None:
    more = [*parents(chain, "semi"), "balanced_head={threshold: 0.1}", "data.loader.sampling=uniform"]
    more += ["pseudo.thresholds=freematch", "pseudo.fairness=0.05"]
    straight = chain.complete("semi", *more, "run.experiment=abc-straight")
    start_and_signal(chain, "semi", *more, "run.experiment=abc-killed", number=signal.SIGKILL, after_steps=5)
    assert bytes_of(chain.complete("semi", *more, "run.experiment=abc-killed")) == bytes_of(straight)
    assert rows(straight)[-2]["train/balanced"] > 0
    assert load_file(straight / "export" / "model.safetensors")["head.weight"].shape[0] == 10
    found = json.loads((straight / "evaluation.json").read_text())["models"]["teacher"]["top1"]
    assert 0 <= found <= 100


@pytest.mark.parametrize("method", [["crt"], ["tau-norm"], ["tau-norm", "--tau", "1"]], ids=" ".join)
def test_an_export_is_rebalanced_to_an_export(chain: Stages, tmp_path: Path, method: list[str]) -> None:
    export = chain.runs / "smoke" / "semi" / "export"
    data = ["--train", chain.digits / "train", "--split", chain.digits / "split.json", "--out", tmp_path / "out"]
    done = warm.run([sys.executable, "-m", "pipeline.rebalance", *map(str, [export, *data, "--method", *method])])
    assert done.returncode == 0, done.stderr
    assert "after" in done.stdout
    old, new = (load_file(folder / "model.safetensors") for folder in (export, tmp_path / "out"))
    changed = [name for name in old if not old[name].equal(new[name])]
    assert changed == ["head.bias", "head.weight"] or (
        "tau" in method[0] and changed == ["head.bias"]
    )  # the best tau may be 0
    card = json.loads((tmp_path / "out" / "model.json").read_text())
    assert card["lineage"]["parents"][0]["role"] == "init_from"
    assert card["labels_seen"] == json.loads((export / "model.json").read_text())["labels_seen"]
    again = warm.run([sys.executable, "-m", "pipeline.rebalance", *map(str, [export, *data[:-1], tmp_path])])
    assert again.returncode == 2
    assert "is no export" in again.stderr


def test_a_run_without_an_accepted_pseudo_label_warns_with_advice_from_half_of_its_steps_on(chain: Stages) -> None:
    """It is shorter than alarms.after_steps, and only this alarm does not wait for those."""
    more = ["pseudo.threshold=1.0", "loop.steps=4", "run.experiment=collapse"]
    done = chain.run("semi", *parents(chain, "semi"), *more)
    assert done.returncode == 0
    assert "no pseudo-label is accepted, so the unlabelled images teach nothing" in done.stderr
    assert "pseudo.threshold 1; lower pseudo.threshold, train stage 2 longer, or leave stage 3 out" in done.stderr
    incidents = (chain.runs / "collapse" / "semi" / "incidents.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in incidents] == [2, 3, 4]


def test_a_collapse_may_end_the_run_in_6(chain: Stages) -> None:
    more = ["alarms.after_steps=2", "pseudo.threshold=1.0", "run.experiment=collapsed", "loop.on_alarm=stop"]
    done = chain.run("semi", *parents(chain, "semi"), *more)
    assert done.returncode == 6
    assert "stopped at step 2: ssl/mask_rate is 0" in done.stderr
