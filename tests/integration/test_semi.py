"""Stage 3's options in real runs: any backbone, baselines by config, and what each of them adds to a checkpoint."""

import json
import signal
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

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


def test_averaged_statistics_of_another_backbone_survive_a_kill(chain: Stages, efficientvim: Path) -> None:
    more = [f"init_from={efficientvim}", "ema.buffers=average"]
    straight = chain.complete("semi", *more, "run.experiment=bn-straight")
    start_and_signal(chain, "semi", *more, "run.experiment=bn-killed", number=signal.SIGKILL, after_steps=5)
    assert bytes_of(chain.complete("semi", *more, "run.experiment=bn-killed")) == bytes_of(straight)
    teacher, student = (load_file(straight / name / "model.safetensors") for name in ("export", "export-student"))
    name = next(n for n in teacher if n.endswith("running_var"))
    assert not teacher[name].equal(student[name])


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


def test_a_collapse_is_an_incident(chain: Stages) -> None:
    more = ["alarms.after_steps=2", "pseudo.threshold=1.0", "loop.steps=4", "run.experiment=collapse"]
    done = chain.run("semi", *parents(chain, "semi"), *more)
    assert done.returncode == 0
    assert "hardly any pseudo-label is accepted" in done.stderr
    incidents = (chain.runs / "collapse" / "semi" / "incidents.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in incidents] == [2, 3, 4]


def test_a_collapse_may_end_the_run_in_6(chain: Stages) -> None:
    more = ["alarms.after_steps=2", "pseudo.threshold=1.0", "run.experiment=collapsed", "loop.on_alarm=stop"]
    done = chain.run("semi", *parents(chain, "semi"), *more)
    assert done.returncode == 6
    assert "stopped at step 2: ssl/mask_rate is 0" in done.stderr
