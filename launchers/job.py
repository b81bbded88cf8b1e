"""What runs inside a job of SLURM: one rank per task of srun, and after them the verdict.

submitit requeues from a signal handler of rank 0, where a collective save would deadlock or be cut off. Here a signal
takes the same way as everywhere: flag, vote, save together, exit with 75. Each rank that does not end with 0 leaves its
code in a file. When srun has returned, the batch script calls `python -m launchers.job LOGS SRUN_CODE MAX_REQUEUES`,
which finds the reason among them, then ends the job with it or sends the job back into the queue under the same id.

LOGS/JOB/
  job.json                      stage, config and run folder
  start_000_rank_00003          the exit code of a rank that did not end with 0
  verdicts.jsonl                how each start ended
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import queue
from pipeline.errors import DistributedFailure, EnvironmentProblem, Interrupted, PipelineError
from pipeline.files import replace_text
from pipeline.train.signals import STOPPING, interrupt_on_signals
from stages import SPECS

REQUEUED = "back into the queue"
# Seconds between attempts at a requeue: ten minutes in all, in which a slurmctld restarts. It looks at time limits twice a
# minute, so a longer pause could let it end a job as out of time before it is asked to requeue it.
PAUSES = (1, 2, 4, 8, *[15] * 39)
LOST, SAVED = DistributedFailure.exit_code, Interrupted.exit_code
# A reason comes before a bug, a bug before an interruption, and all before the loss of a peer, which they cause.
_BLAME = {1: 1, SAVED: 2, LOST: 3}


@dataclass(frozen=True)
class Job:
    """A stage of a run, as each task calls it. Holds paths only: all state is in the run's folder."""

    stage: str
    config: Path  # as submitted; later edits of the original do not reach the queue
    folder: Path  # of the run
    logs: Path

    def __call__(self) -> None:
        interrupt_on_signals()  # instead of submitit's handlers
        code = self._run()
        rank = os.environ.get("SLURM_PROCID", "0")
        if code:
            (start_folder(self.logs, os.environ) / f"{_start(os.environ)}_rank_{int(rank):05d}").write_text(str(code))
        sys.stdout.flush()
        sys.stderr.flush()
        # With srun's -K1 a rank that leaves with 75 would end those that still save: only rank 0 says it.
        os._exit(0 if code == SAVED and rank != "0" else code)

    def _run(self) -> int:
        try:
            folder = start_folder(self.logs, os.environ)
            folder.mkdir(parents=True, exist_ok=True)
            if os.environ.get("SLURM_PROCID", "0") == "0":
                told = {"stage": self.stage, "config": str(self.config), "folder": str(self.folder)}
                replace_text(folder / "job.json", json.dumps(told))
            from pipeline.train.distributed import rendezvous

            os.environ.update(rendezvous(os.environ))
            from stages.__main__ import main

            # The run's environment.json tells a command that a person can give again.
            sys.orig_argv[1:] = ["-m", "stages", self.stage, str(self.config)]
            return main([self.stage, str(self.config)])
        except PipelineError as error:  # a signal may come at any place
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code


def job_id(environment: Mapping[str, str]) -> str:
    """A task of an array by its place: SLURM_JOB_ID of an array's last task is the id of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def start_folder(logs: Path, environment: Mapping[str, str]) -> Path:
    return logs / job_id(environment)


def _start(environment: Mapping[str, str]) -> str:
    return f"start_{int(environment.get('SLURM_RESTART_COUNT', '0')):03d}"


def blame(codes: Sequence[int], srun_code: int) -> int:
    """One exit code for a start, from its ranks' codes (those that are not 0) and srun's."""
    if codes:
        return min(codes, key=lambda code: _BLAME.get(code, 0))
    if srun_code - 128 in STOPPING:  # ranks too young to have a handler
        return SAVED
    return LOST if srun_code else 0


def worth_a_requeue(code: int, checkpoint: int, before: Sequence[Mapping[str, Any]]) -> bool:
    """An interrupted start is. So is a lost rank, unless the start before was lost at the same checkpoint: no accident then."""
    if code == LOST:
        return not before or before[-1]["code"] != LOST or before[-1]["checkpoint"] != checkpoint
    return code == SAVED


def newest_checkpoint(run: Path) -> int:
    """Its step, or -1."""
    return max((int(p.parent.name.removeprefix("step_")) for p in run.glob("checkpoints/step_*/COMPLETE")), default=-1)


def conclude(logs: Path, srun_code: int, max_requeues: int) -> int:
    """The batch script's last act; returns the job's exit code."""
    folder, restarts = start_folder(logs, os.environ), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    codes = [int(path.read_text()) for path in folder.glob(f"{_start(os.environ)}_rank_*")]
    code = blame(codes, srun_code)
    told = json.loads((folder / "job.json").read_text()) if (folder / "job.json").exists() else {}
    run = Path(told["folder"]) if told else folder
    path = folder / "verdicts.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    checkpoint = newest_checkpoint(run)
    row = {"time": time.time(), "start": restarts, "code": code, "checkpoint": checkpoint}
    folder.mkdir(parents=True, exist_ok=True)

    def say(then: str) -> None:
        """What follows, as far as it is known: this script may be ended at any moment."""
        replace_text(path, "".join(json.dumps(r) + "\n" for r in (*before, row | {"then": then})))
        print(f"{told.get('stage', 'job')}: start {restarts + 1} ended with {code}; {then}", flush=True)

    if code == 0:
        say("complete")
        if told:
            _write_report(run.parent, told["stage"])
    elif not worth_a_requeue(code, checkpoint, before):
        say("no requeue would help")
    elif restarts >= max_requeues:
        say(f"no requeue is left of {max_requeues}")
    else:
        _send_back(job_id(os.environ), say)
    return code


def _send_back(job: str, say: Callable[[str], None]) -> None:
    """Into the queue again under the same id. SLURM may be long in answering: all later stages hang on it."""
    words = ""
    for pause in PAUSES:
        try:
            state = queue.job_state(job).state
            if state != "RUNNING":
                # A cancelled job would rise from the dead; one that SLURM preempts is in the queue already.
                say(f"left to SLURM, which has it as {state}")
                return
            say(REQUEUED)  # first, for it ends this script
            queue.requeue(job)
            return
        except EnvironmentProblem as error:
            words = str(error)
        say(f"not requeued yet: {words}; it is tried again in {pause} s")
        time.sleep(pause)
    say(f"not requeued: {words}; submit it again to continue")


def _write_report(experiment: Path, stage: str) -> None:
    """The experiment as far as it has come; with pictures of what the models see after the last stage."""
    try:
        if stage == list(SPECS)[-1]:
            from pipeline.report import experiment as report

            page = report.run([experiment], None)
        else:
            from pipeline.report.page import write_report

            page = write_report([experiment], experiment / "report.html")
        print(f"report: {page}")
    except Exception as error:  # the stage is complete, whatever becomes of its page
        print(f"no report: {type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(conclude(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
