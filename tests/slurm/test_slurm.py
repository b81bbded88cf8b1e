"""On a real SLURM of two nodes: the chain, signals, requeues, failures, a dead node, preemption, sweeps."""

import subprocess

from tests.conftest import Stages
from tests.slurm.conftest import Person

LONG = ("arm:loop.steps=300", "arm:loop.save_every=300")


def test_the_chain_with_a_signal_in_mid_step_ends_as_if_there_had_been_none(person: Person, stages: Stages) -> None:
    jobs = person.submit("chain", "smoke", "run.experiment=chain", *LONG)
    assert list(jobs) and set(jobs) == {"arm", "distill", "semi"}
    person.until_step("chain", "arm", 20)
    subprocess.run(["scancel", "--signal=USR2", jobs["arm"]], check=True)
    person.cluster.until(lambda: person.cluster.job(jobs["arm"]).restarts == 1, "the requeue")
    waiting = person.cluster.job(jobs["distill"])
    assert (waiting.state, waiting.reason) == ("PENDING", "Dependency")
    assert person.completed(jobs["arm"]).restarts == 1
    verdicts = person.verdicts("chain", jobs["arm"])
    assert [row["code"] for row in verdicts] == [75, 0]
    assert 20 <= verdicts[0]["checkpoint"] < 300
    straight = stages.complete("arm", "run.experiment=straight", *(o.removeprefix("arm:") for o in LONG), nproc=2)
    weights = (person.runs / "chain/arm/export/model.safetensors").read_bytes()
    assert weights == (straight / "export/model.safetensors").read_bytes()
    person.completed(jobs["distill"])
    person.completed(jobs["semi"])
    assert "stage 3, teacher" in (person.runs / "chain/report.html").read_text()
    again = person.slurm("chain", "smoke", "run.experiment=chain", *LONG)
    assert "nothing to submit" in again.stdout
