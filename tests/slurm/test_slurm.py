"""On a real SLURM of two nodes: the chain, signals, requeues, failures, a dead node, preemption, sweeps."""

import json
import subprocess
from pathlib import Path

import pytest

from launchers.chain import read_cluster, read_steps
from launchers.slurm import script
from tests.conftest import Stages
from tests.slurm.conftest import Person
from tests.waiting import slowness

STEPS = 160
LONG = (f"arm:loop.steps={STEPS}", "arm:loop.save_every=1000")


@pytest.fixture(scope="module")
def straight(stages: Stages) -> bytes:
    """The weights of stage 1 after STEPS steps of two processes that nothing interrupts."""
    run = stages.complete("arm", "run.experiment=straight", f"loop.steps={STEPS}", nproc=2)
    return (run / "export/model.safetensors").read_bytes()


def test_the_chain_with_a_signal_in_mid_step_ends_as_if_there_had_been_none(person: Person, straight: bytes) -> None:
    """And with a slurmctld that does not answer when the job would go back into the queue."""
    jobs = person.submit("chain", "smoke", "run.experiment=chain", *LONG)
    assert set(jobs) == {"arm", "distill", "semi"}
    cluster, overrides = read_cluster(
        Path("configs/cluster/cpu.yaml"), [*person.overrides, "run.experiment=chain", *LONG]
    )
    logs = person.runs / "chain/slurm"
    for step, before in zip(read_steps("chain", "smoke", overrides), ("", jobs["arm"], jobs["distill"]), strict=True):
        submitted = (logs / f"{jobs[step.stage]}_submission.sh").read_text()
        assert script(cluster, step, logs, before) == submitted  # what a plan shows is what runs
    person.until_step("chain", "arm", 20)
    subprocess.run(["scancel", "--signal=USR2", jobs["arm"]], check=True)
    person.cluster.until(person.cluster.verdict_begins, "the verdict")
    with person.cluster.silent_controller():
        person.cluster.until(lambda: "not requeued yet" in person.logs(jobs["arm"]), "a requeue that is not heard")
    person.cluster.until(lambda: person.cluster.job(jobs["arm"]).restarts == 1, "the requeue")
    waiting = person.cluster.job(jobs["distill"])
    assert (waiting.state, waiting.reason) == ("PENDING", "Dependency")
    assert person.completed(jobs["arm"]).restarts == 1
    verdicts = person.verdicts("chain", jobs["arm"])
    assert [(row["code"], row["then"]) for row in verdicts] == [(75, "back into the queue"), (0, "complete")]
    assert 20 <= verdicts[0]["checkpoint"] < STEPS
    assert person.weights("chain", "arm") == straight
    person.completed(jobs["distill"])
    person.completed(jobs["semi"])
    assert "stage 3, teacher" in (person.runs / "chain/report.html").read_text()
    again = person.slurm("chain", "smoke", "run.experiment=chain", *LONG)
    assert "nothing to submit" in again.stdout


def test_gpus_that_the_preset_asks_for_and_torch_does_not_see_end_the_job_with_5(person: Person) -> None:
    """The nodes have eight GPUs in SLURM's books, and none that a process could see."""
    more = ["run.experiment=promised", "cluster:nodes=1", "cluster:gpus_per_node=8", "cluster:tasks_per_node=1"]
    job = person.submit("arm", "configs/arm/smoke.yaml", *more)["arm"]
    state = person.cluster.ended(job)
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", 5, 0), person.logs(job)
    assert "GPUs were promised (SLURM_" in person.logs(job)
    assert "but torch sees none: no driver" in person.logs(job)


def test_a_failed_first_stage_leaves_the_others_not_run_and_status_says_why(person: Person) -> None:
    jobs = person.submit("chain", "smoke", "run.experiment=failing", "arm:optim.lr=1e30", "cluster:nodes=1")
    failed = person.cluster.ended(jobs["arm"])
    assert (failed.state, failed.exit_code, failed.restarts) == ("FAILED", 6, 0), person.logs(jobs["arm"])
    assert person.cluster.ended(jobs["distill"]).state == "CANCELLED"
    assert person.cluster.ended(jobs["semi"]).state == "CANCELLED"
    lines = person.type("status", "failing", "--root", str(person.runs)).stdout.splitlines()
    assert "failed" in lines[0]
    assert "by step 1, first at data step 0" in lines[0]
    assert f"job {jobs['arm']}" in lines[0]
    assert [line.split()[1:3] for line in lines[1:]] == [["not", "run"], ["not", "run"]]
    assert f"job {jobs['arm']}, which it needs, did not complete" in lines[1]


def test_without_a_requeue_left_an_interrupted_stage_is_a_failed_job(person: Person) -> None:
    # It must not complete while the commands below are typed, however fast the machine is.
    endless = ["arm:loop.steps=100000", "arm:loop.save_every=1000"]
    more = ["run.experiment=spent", "cluster:max_requeues=0", "cluster:nodes=1", *endless]
    jobs = person.submit("chain", "smoke", *more)
    person.until_step("spent", "arm", 5)
    running = person.type("status", "spent", "--root", str(person.runs)).stdout
    assert "running" in running
    assert f"waits for job {jobs['arm']}" in running
    subprocess.run(["scancel", jobs["semi"]], check=True)
    cancelled = person.type("status", "spent", "--root", str(person.runs)).stdout.splitlines()[2]
    assert f"job {jobs['semi']} was cancelled, but job {jobs['distill']}, its parent, continues" in cancelled
    for other, was in (("distill:optim.lr=3e-3", "optim.lr was 0.002"), ("cluster:time=0:30:00", "'1:00:00'")):
        refused = person.slurm("chain", "smoke", *more, other)
        assert refused.returncode == 2
        assert "is in the queue with other values (1 keys differ; " in refused.stderr
        assert was in refused.stderr
    again = person.submit("chain", "smoke", *more)  # what has left the queue, and that alone
    assert [again[stage] == jobs[stage] for stage in ("arm", "distill", "semi")] == [True, True, False]
    subprocess.run(["scancel", "--signal=USR2", jobs["arm"]], check=True)
    ended = person.cluster.ended(jobs["arm"])
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 75, 0)
    assert person.cluster.ended(jobs["distill"]).state == "CANCELLED"
    assert "no requeue is left" in person.type("status", "spent", "--root", str(person.runs)).stdout


def test_a_real_time_limit_leads_back_into_the_queue_and_a_cancelled_job_stays_cancelled(person: Person) -> None:
    more = ["run.experiment=limited", "cluster:nodes=1", "loop.steps=20000"]
    # SLURM counts a limit in minutes. A start must come to a checkpoint before the signal, on a slow machine too.
    minutes = 1 if slowness() < 2 else 1 + round(slowness())
    limit = [f"cluster:time=0:{minutes:02d}:00", "cluster:signal_seconds=20", "cluster:partition='closed,main'"]
    job = person.submit("arm", "configs/arm/smoke.yaml", *more, *limit)["arm"]
    person.cluster.until(lambda: person.cluster.job(job).restarts == 1, "the time limit's requeue", 30 + 60 * minutes)
    reached = person.verdicts("limited", job)[0]["checkpoint"]
    assert reached > 0
    person.until_step("limited", "arm", reached + 5)
    subprocess.run(["scancel", job], check=True)
    ended = person.cluster.ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 1)
    assert not person.cluster.job(job).active
    assert [(row["code"], row["then"]) for row in person.verdicts("limited", job)][:1] == [(75, "back into the queue")]


def test_a_node_that_dies_in_mid_run_is_survived(person: Person, straight: bytes) -> None:
    more = ["run.experiment=crash", f"loop.steps={STEPS}", "loop.save_every=20"]
    job = person.submit("arm", "configs/arm/smoke.yaml", *more)["arm"]
    person.until_step("crash", "arm", 30)
    person.cluster.kill_node("node2")
    person.cluster.until(lambda: person.cluster.job(job).restarts == 1, "the requeue after the crash")
    person.cluster.start_node("node2")
    assert person.completed(job).restarts == 1
    assert person.weights("crash", "arm") == straight


def test_a_preemption_by_a_higher_partition_is_survived(person: Person, straight: bytes) -> None:
    more = ["run.experiment=preempted", f"loop.steps={STEPS}", "loop.save_every=20"]
    job = person.submit("arm", "configs/arm/smoke.yaml", *more)["arm"]
    person.until_step("preempted", "arm", 30)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"]
    other = subprocess.run(urgent, capture_output=True, text=True, check=True).stdout.strip()
    assert person.cluster.ended(other).state == "COMPLETED"
    assert person.completed(job).restarts == 1
    assert person.weights("preempted", "arm") == straight


def test_a_sweep_is_a_throttled_array_and_submitting_again_runs_only_what_is_not_done(person: Person) -> None:
    more = ["run.experiment=grid", "cluster:nodes=1", "cluster:array_parallel=2", "loop.steps=4"]
    sweep = ["arm", "configs/arm/smoke.yaml", *more, "--sweep", "optim.lr=1e-3,2e-3,1e30"]
    assert person.slurm(*sweep).returncode == 0
    points = [f"grid-lr_{value}" for value in ("1e-3", "2e-3", "1e30")]
    jobs = [json.loads((person.runs / name / "slurm/arm.json").read_text())["job"] for name in points]
    array = jobs[0].split("_")[0]
    assert jobs == [f"{array}_{i}" for i in range(3)]
    assert "queued already" in person.slurm(*sweep).stdout
    assert [person.cluster.ended(job).state for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED"]
    again = person.slurm(*sweep).stdout
    assert again.count("submitted") == 1
    assert "grid-lr_1e30" in again


def test_a_search_is_rounds_of_arrays_until_there_are_enough_trials(person: Person) -> None:
    """Two trials at a time, of three; the last call finds all of them complete and writes the table, the least loss first."""
    pytest.importorskip("optuna", reason="pip install 'visionmamba-pipeline[sweep]'")
    more = ["run.experiment=found", "cluster:nodes=1", "cluster:array_parallel=2", "loop.steps=4", "loop.eval_every=2"]
    over = ["--over", "optim.lr=1e-3,2e-3,4e-3", "--sampler", "grid", "--trials", "3"]
    words = [*person.overrides, *more, *over, "--cluster", "configs/cluster/cpu.yaml"]

    def call() -> str:
        done = person.type("sweep", "arm", "configs/arm/smoke.yaml", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(number: int) -> str:
        return json.loads((person.runs / f"found-sweep-{number:03d}" / "slurm/arm.json").read_text())["job"]

    assert "trials on the cluster: 2" in call()
    assert "queued already" in call()
    for number in (0, 1):
        person.completed(job(number))
    assert "trials on the cluster: 1" in call()
    person.completed(job(2))
    assert "Trial 00" in call()
    header, *rows = (person.runs / "found-sweep" / "sweep.csv").read_text().splitlines()
    assert header == "trial,state,optim.lr,val/loss"
    losses = [float(row.rpartition(",")[2]) for row in rows]
    assert len(losses) == 3
    assert losses == sorted(losses)


def test_studies_are_arrays_that_wait_point_by_point(person: Person) -> None:
    """Two seeds of the chain: each seed's stage 2 waits for its own stage 1 only."""
    more = ["run.experiment=study", "cluster:nodes=1", "arm:loop.steps=4"]
    assert person.slurm("chain", "smoke", *more, "--sweep", "run.seed=0,1").returncode == 0
    jobs = {}
    for seed in (0, 1):
        for stage in ("distill", "semi"):
            record = json.loads((person.runs / f"study-seed_{seed}/slurm/{stage}.json").read_text())
            jobs[stage, seed] = record["job"]
    assert jobs["semi", 1].split("_")[1] == jobs["distill", 1].split("_")[1] == "1"
    for seed in (0, 1):
        person.completed(jobs["distill", seed])
    subprocess.run(["scancel", jobs["semi", 0].split("_")[0]], check=True)
