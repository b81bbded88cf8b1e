"""Semi-ViT Huge's scheme: stage 2 exports the model and its average; stage 3 starts the student and the teacher from them."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launchers.chain import open_steps, read_steps
from pipeline.errors import HandoverError
from tests.conftest import Stages
from tests.integration.test_resume import parents, start_and_signal

WEIGHTS = "model.safetensors"
STARTS = ["init_from=distill/export-student", "teacher_from=distill"]


@pytest.fixture(scope="module")
def both(chain: Stages) -> Path:
    """Stage 2 with an average that stays behind; its run has two exports."""
    more = ["run.experiment=two-starts", "average={decay: 0.9}", "loop.steps=6", *parents(chain, "distill")]
    return chain.complete("distill", *more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_stage_2_exports_the_model_and_its_average(chain: Stages, both: Path) -> None:
    """The student's export is, bit for bit, that of the same run without an average."""
    more = ["run.experiment=alone-2", "loop.steps=6", *parents(chain, "distill")]
    alone = chain.complete("distill", *more)
    assert (both / "export-student" / WEIGHTS).read_bytes() == (alone / "export" / WEIGHTS).read_bytes()
    assert not (alone / "export-student").exists()
    assert (both / "export" / WEIGHTS).read_bytes() != (both / "export-student" / WEIGHTS).read_bytes()


def test_the_student_starts_from_the_model_and_the_teacher_from_the_average(chain: Stages, both: Path) -> None:
    """A step of rate 0 leaves the student, and a decay of 3/4 then puts the teacher a quarter of the way to it."""
    still = [
        "optim={lr: 1e-300, weight_decay: 0}",
        "loop.steps=1",
        "ema={mode: ema, base_decay: 0.75, warmup_steps: 0}",
    ]
    run = chain.complete("semi", "run.experiment=two-starts", *STARTS, *still)
    model, average = weights(both / "export-student"), weights(both / "export")
    student, teacher = weights(run / "export-student"), weights(run / "export")
    for name in model:
        assert torch.equal(student[name], model[name]), name
        want = 0.75 * average[name].double() + 0.25 * model[name].double()
        torch.testing.assert_close(teacher[name].double(), want, rtol=1e-6, atol=1e-7, msg=name)
    card = json.loads((run / "export" / "model.json").read_text())
    got = {parent["role"]: parent["weights_sha256"] for parent in card["lineage"]["parents"]}
    cards = {folder: json.loads((both / folder / "model.json").read_text()) for folder in ("export", "export-student")}
    assert got == {
        "init_from": cards["export-student"]["weights_sha256"],
        "teacher_from": cards["export"]["weights_sha256"],
    }
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    apart = sum((average[name].double() - model[name].double()).square().sum() for name in model).sqrt()
    assert first["ema/r"] == pytest.approx(float(apart), rel=1e-5)


def test_two_starts_survive_a_kill_and_agree_at_every_zero_stage(chain: Stages, both: Path) -> None:
    starts = [f"init_from={both / 'export-student'}", f"teacher_from={both / 'export'}", "ema.warmup_steps=1"]
    straight = chain.complete("semi", *starts, "run.experiment=starts-straight")
    start_and_signal(chain, "semi", *starts, "run.experiment=starts-killed", number=signal.SIGKILL, after_steps=5)
    killed = chain.complete("semi", *starts, "run.experiment=starts-killed")
    for folder in ("export", "export-student"):
        assert (killed / folder / WEIGHTS).read_bytes() == (straight / folder / WEIGHTS).read_bytes()
    for zero in (1, 3):
        cut = [f"run.experiment=starts-zero{zero}", f"engine.zero_stage={zero}", "engine.keep_whole=0"]
        run = chain.complete("semi", *starts, *cut, nproc=2)
        for name, want in weights(straight / "export").items():
            torch.testing.assert_close(weights(run / "export")[name], want, rtol=1e-4, atol=1e-5, msg=name)


def test_what_cannot_be_is_refused_before_a_process_starts(chain: Stages, both: Path) -> None:
    def refused(*more: str) -> str:
        done = chain.run("semi", "run.experiment=two-refused", *more)
        assert done.returncode in (2, 4), done.stderr
        return done.stderr

    other = chain.complete(
        "distill", "run.experiment=two-other", "init_from=null", "model={name: efficientvim_nano}", "loop.steps=3"
    )
    said = refused(f"init_from={both / 'export'}", f"teacher_from={other / 'export'}")
    assert "has model.name = 'efficientvim_nano'" in said
    assert "give exports of one model" in said
    assert "leave teacher_from out" in refused(
        "init_from=null", "model={name: wrn_28_2}", f"teacher_from={both / 'export'}"
    )
    assert "no export at" in refused("init_from=distill/export-student")


def test_a_chain_knows_both_exports_before_they_exist(chain: Stages) -> None:
    names = [*chain.overrides(), "run.experiment=unborn", "distill:average={decay: 0.9}"]
    steps = read_steps("chain", "smoke", [*names, *(f"semi:{start}" for start in STARTS)])
    assert len(open_steps(steps, 1)) == 3
    with pytest.raises(HandoverError, match=r"no export at .*export-student"):
        open_steps(read_steps("chain", "smoke", [*names[:-1], f"semi:{STARTS[0]}"]), 1)
