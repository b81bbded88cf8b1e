"""The best state of a run: it is that of its checkpoint, it survives a kill and other processes, and runs end early."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.exports.card import Card
from tests.conftest import Stages
from tests.integration.test_resume import parents, start_and_signal

KEEP = ("loop.select=best", "loop.eval_every=1", "loop.save_every=1", "loop.keep_checkpoints=100")
LEAP = ("optim.lr=0.1", "optim.min_lr=0.1")  # so large that the last state is not the best
STILL = ("optim.lr=1e-30", "loop.eval_every=1", "loop.patience=2")  # no weight moves, so no validation is better


def rows(run: Path, name: str) -> dict[int, float]:
    found = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in found if name in row}


@pytest.mark.parametrize(("stage", "network", "seen"), [("distill", "master", 8), ("semi", "teacher", 9)])
def test_the_export_is_the_state_of_the_best_validation(chain: Stages, stage: str, network: str, seen: int) -> None:
    """Stage 3 starts from a classifier, so it validates before its first step too."""
    more = [f"run.experiment=best-{stage}", *parents(chain, stage), *KEEP, *LEAP]
    run = chain.complete(stage, *more)
    prefix = "val/teacher_" if network == "teacher" else "val/"
    top1, nll = rows(run, f"{prefix}top1"), rows(run, f"{prefix}nll")
    best, *later = sorted(top1)
    for step in later:  # a start gives way to a state that is as accurate
        better = (top1[step], -nll[step]) > (top1[best], -nll[best]) if best else top1[step] >= top1[0]
        best = step if better else best
    selected = Card.read(run / "export").selected
    assert selected is not None
    assert (selected.select, selected.step, selected.trained, selected.validations) == ("best", best, 8, seen)
    assert selected.best == {f"{prefix}top1": top1[best], f"{prefix}nll": nll[best]}
    assert selected.last == {f"{prefix}top1": top1[8], f"{prefix}nll": nll[8]}
    assert best < 8, "the test needs a best state that is not the last"
    exported = load_file(run / "export" / "model.safetensors")
    if best:
        shards = load_file(next((run / "checkpoints" / f"step_{best:08d}").glob("shards_*")))
        saved = {name: shards[f"{network}/{name}@0"] for name in exported if f"{network}/{name}@0" in shards}
    else:
        saved = load_file(chain.runs / "smoke/distill/export/model.safetensors")
    assert saved
    for name, value in saved.items():
        assert torch.equal(exported[name].flatten(), value.flatten()), name
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["selected"].startswith(f"step {best} of 8; best of {seen} validations by {prefix}top1")
    assert evaluation["models"]["teacher" if network == "teacher" else "student"]["top1"] == pytest.approx(
        Card.read(run / "export").metrics[f"test/{'teacher' if network == 'teacher' else 'student'}_top1"]
    )
    assert f"best of {seen} validations by {prefix}top1" in (run / "export" / "README.md").read_text()


def test_a_stage_that_only_loses_exports_what_it_was_given(chain: Stages) -> None:
    """What stage 2 gave is validated as step 0, and steps that ruin the weights are all worse."""
    learnt = [
        "init_from=null",
        "run.experiment=learnt",
        "loop.steps=60",
        "optim={kind: muon, lr: 1e-2, warmup_steps: 3}",
    ]
    given = load_file(chain.complete("distill", *learnt) / "export/model.safetensors")
    more = [f"init_from={chain.runs}/learnt/distill/export", *KEEP, "ema={mode: ema, base_decay: 0.01}"]
    run = chain.complete("semi", "run.experiment=only-loses", *more, "optim={lr: 3, min_lr: 3, warmup_steps: 0}")
    selected, top1 = Card.read(run / "export").selected, rows(run, "val/teacher_top1")
    assert selected is not None
    assert top1[0] > max(top1[step] for step in range(1, 9))
    assert (selected.step, selected.trained) == (0, 8)
    for name, value in load_file(run / "export/model.safetensors").items():
        assert torch.equal(value, given[name]), name


def test_the_best_state_survives_kill_9(chain: Stages) -> None:
    straight = chain.runs / "best-semi" / "semi"
    more = ["run.experiment=best-killed", *parents(chain, "semi"), *KEEP, *LEAP]
    start_and_signal(chain, "semi", *more, number=signal.SIGKILL, after_steps=6)
    run = chain.complete("semi", *more)
    for export in ("export", "export-student"):
        weights = f"{export}/model.safetensors"
        assert (run / weights).read_bytes() == (straight / weights).read_bytes()
    assert Card.read(run / "export").selected == Card.read(straight / "export").selected


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_best_state_survives_other_processes_and_zero_stages(chain: Stages, zero: int) -> None:
    """The checkpoints of step 6, written by one process at ZeRO 2, continue on two at another stage."""
    straight = chain.runs / "best-semi" / "semi"
    elsewhere = Stages(chain.runs / f"elastic{zero}", chain.digits)  # the same experiment under another root
    run = elsewhere.runs / "best-semi" / "semi"
    shutil.copytree(straight, run)
    for late in ("step_00000007", "step_00000008"):
        shutil.rmtree(run / "checkpoints" / late)
    for export in ("export", "export-student"):
        shutil.rmtree(run / export)
    more = ["run.experiment=best-semi", *parents(chain, "semi"), *KEEP, *LEAP, f"engine.zero_stage={zero}"]
    elsewhere.complete("semi", *more, nproc=2)
    there, here = (Card.read(folder / "export").selected for folder in (straight, run))
    assert there is not None
    assert here is not None
    assert (here.step, here.trained) == (there.step, there.trained)
    a, b = (load_file(folder / "export" / "model.safetensors") for folder in (straight, run))
    for name in a:
        np.testing.assert_allclose(a[name].numpy(), b[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_run_without_a_better_validation_ends_early_and_stays_ended(chain: Stages) -> None:
    more = ["run.experiment=early-end", *parents(chain, "distill"), *STILL]
    done = chain.run("distill", *more)
    assert done.returncode == 0, done.stderr
    assert "the result is the last step, 3, ended early: 8 were planned" in done.stderr
    run = chain.runs / "early-end" / "distill"
    assert json.loads((run / "status.json").read_text())["step"] == 3
    before = (run / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "export")
    chain.complete("distill", *more)  # from its last checkpoint, without another step
    assert (run / "export" / "model.safetensors").read_bytes() == before
    assert sorted(rows(run, "train/loss")) == [1, 2, 3]


def test_a_pretrainer_is_selected_by_its_loss(chain: Stages) -> None:
    run = chain.complete("arm", "run.experiment=best-arm", "loop.select=best", "loop.eval_every=2")
    loss = rows(run, "val/loss")
    selected = Card.read(run / "export").selected
    assert selected is not None
    assert selected.best == {"val/loss": min(loss.values())}


def test_a_pretrainer_may_be_selected_by_its_linear_probe_and_has_then_seen_labels(chain: Stages) -> None:
    more = ["run.experiment=probed-arm", "loop.select=best", "loop.eval_every=4", "select_by=linear"]
    run = chain.complete("arm", *more, "linear_probe.neighbours=5")
    linear, card = rows(run, "val/linear"), Card.read(run / "export")
    assert card.selected is not None
    assert card.selected.best["val/linear"] == max(linear.values())
    assert [seen.count for seen in card.labels_seen] == [51]
    assert Card.read(chain.runs / "smoke/arm/export").labels_seen == ()


@pytest.mark.parametrize(
    ("key", "code", "said"),
    [
        ("loop.select=best", 2, "loop: select=best compares validations, but eval_every is null"),
        (
            "loop.select=best loop.eval_every=2 data.split=null",
            2,
            "there are no validation images; set loop.select=last",
        ),
    ],
)
def test_without_validations_best_is_refused_in_a_sentence(chain: Stages, key: str, code: int, said: str) -> None:
    done = chain.run("arm", "run.experiment=refused-best", *key.split())
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
