"""The inside of a SLURM job: one rank per task of srun, and after them the verdict.

submitit requeues from a signal handler of rank 0, where a collective save would deadlock or be cut off. Here a signal is
handled as everywhere: it sets a flag, the ranks vote, save together and exit with 75. Each rank that does not end with 0
writes its code to a file. When srun has returned, the batch script calls
`python -m launchers.job LOGS SRUN_CODE MAX_REQUEUES`. It chooses one code (`exit_codes.blame`), and either ends the job
with it or sends the job back into the queue under the same id.

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
from pipeline.cli import guarded, leave
from pipeline.errors import EnvironmentProblem
from pipeline.exit_codes import ExitCode, blame
from pipeline.files import replace_text
from pipeline.jsonl import read_object, read_rows
from pipeline.train.saved_state import complete, step_of
from pipeline.train.signals import STOPPING, interrupt_on_signals
from stages import SPECS

REQUEUED = "back into the queue"
# Seconds between attempts at a requeue: ten minutes in all, enough for slurmctld to restart. It checks time limits twice a
# minute, so after a longer pause it might end the job as out of time before it is asked to requeue it.
PAUSES = (1, 2, 4, 8, *[15] * 39)


@dataclass(frozen=True)
class Job:
    """One stage of a run, as each task of srun calls it. All state is in the run's folder.

    Attributes:
        stage: The stage's name.
        config: The config as submitted; later edits of the original do not reach the queue.
        folder: The run's folder.
        logs: The folder of all logs.
    """

    stage: str
    config: Path
    folder: Path
    logs: Path

    def __call__(self) -> None:
        """Run the stage as this rank, leave the code in a file if it is not 0, and end the process."""
        interrupt_on_signals()  # instead of submitit's handlers
        rank = os.environ.get("SLURM_PROCID", "0")
        code = guarded(self._run, [self.stage, str(self.config)], rank=rank)
        if code:
            name = f"{_start(os.environ)}_rank_{int(rank):05d}"
            replace_text(start_folder(self.logs, os.environ) / name, str(int(code)))
        # srun's -K1 would end ranks that still save when another leaves with 75, so only rank 0 does.
        leave(0 if code == ExitCode.INTERRUPTED and rank != "0" else code)

    def _run(self, words: list[str]) -> int:
        folder = start_folder(self.logs, os.environ)
        folder.mkdir(parents=True, exist_ok=True)
        if os.environ.get("SLURM_PROCID", "0") == "0":
            told = {"stage": self.stage, "config": str(self.config), "folder": str(self.folder)}
            replace_text(folder / "job.json", json.dumps(told))
        from pipeline.train.rendezvous import rendezvous

        os.environ.update(rendezvous(os.environ))
        from stages.__main__ import main

        # environment.json of the run then names a command that a person can type.
        sys.orig_argv[1:] = ["-m", "stages", *words]
        return main(words)


def job_id(environment: Mapping[str, str]) -> str:
    """Return the job's id, with the index of its task in an array.

    SLURM_JOB_ID does not do: for the last task of an array it is the id of the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def start_folder(logs: Path, environment: Mapping[str, str]) -> Path:
    """Return the folder of this job's codes and verdicts."""
    return logs / job_id(environment)


def _start(environment: Mapping[str, str]) -> str:
    return f"start_{int(environment.get('SLURM_RESTART_COUNT', '0')):03d}"


def code_of_start(codes: Sequence[int], srun_code: int) -> int:
    """Choose one exit code for a start.

    Args:
        codes: The codes of the ranks that did not end with 0.
        srun_code: The exit code of srun.
    """
    if codes:
        return blame(codes)
    if srun_code - 128 in STOPPING:  # the ranks were too young to have a handler
        return ExitCode.INTERRUPTED
    return ExitCode.DISTRIBUTED if srun_code else ExitCode.COMPLETE


def worth_a_requeue(code: int, checkpoint: int, before: Sequence[Mapping[str, Any]]) -> bool:
    """Decide whether another start may help.

    An interrupted start is worth a requeue. So is the loss of a rank, unless the start before lost one at the same
    checkpoint: then it is no accident.

    Args:
        code: The exit code of this start.
        checkpoint: The step of the newest checkpoint, or -1.
        before: The verdicts of the earlier starts.
    """
    if code == ExitCode.DISTRIBUTED:
        return not before or before[-1]["code"] != code or before[-1]["checkpoint"] != checkpoint
    return code == ExitCode.INTERRUPTED


def newest_checkpoint(run: Path) -> int:
    """Return the step of a run's newest checkpoint, or -1."""
    return max(map(step_of, complete(run / "checkpoints")), default=-1)


def conclude(logs: Path, srun_code: int, max_requeues: int) -> int:
    """Write the verdict on a start, and requeue the job if that helps. The batch script ends with this.

    Args:
        logs: The folder of all logs.
        srun_code: The exit code of srun.
        max_requeues: How often the job may be requeued.

    Returns:
        The job's exit code.
    """
    folder, restarts = start_folder(logs, os.environ), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    codes = [int(path.read_text()) for path in folder.glob(f"{_start(os.environ)}_rank_*")]
    code = code_of_start(codes, srun_code)
    told = read_object(folder / "job.json")
    run = Path(told["folder"]) if told else folder
    path = folder / "verdicts.jsonl"
    before = read_rows(path)
    checkpoint = newest_checkpoint(run)
    row = {"time": time.time(), "start": restarts, "code": code, "checkpoint": checkpoint}
    folder.mkdir(parents=True, exist_ok=True)

    def say(then: str) -> None:
        """Record what follows as soon as it is known: this script may be ended at any moment."""
        replace_text(path, "".join(json.dumps(r) + "\n" for r in (*before, row | {"then": then})))
        print(f"{told.get('stage', 'job')}: start {restarts + 1} ended with {code}; {then}", flush=True)

    if code == 0:
        say("complete")
        if told:
            _write_report(run.parent, told["stage"])
    elif not worth_a_requeue(code, checkpoint, before):
        say("not requeued: another start would not help")
    elif restarts >= max_requeues:
        say(f"no requeue is left of the {max_requeues} that the preset allows (cluster:max_requeues)")
    else:
        _send_back(job_id(os.environ), say)
    return code


def _send_back(job: str, say: Callable[[str], None]) -> None:
    """Requeue the job under the same id. All later stages wait for it, so SLURM is asked again if it does not answer."""
    words = ""
    for pause in PAUSES:
        try:
            state = queue.job_state(job).state
            if state != "RUNNING":
                # A requeue would revive a cancelled job; a preempted one is in the queue already.
                say(f"not requeued here: SLURM has the job as {state}")
                return
            say(REQUEUED)  # before the call, which ends this script
            queue.requeue(job)
            return
        except EnvironmentProblem as error:
            words = str(error)
        say(f"not requeued yet: {words}; the next try is in {pause} s")
        time.sleep(pause)
    say(f"not requeued: {words}; submit it again to continue")


def _write_report(experiment: Path, stage: str) -> None:
    """Write the report of the experiment so far. After the last stage it has pictures of what the models see."""
    try:
        if SPECS[stage].is_last:
            from pipeline.report import experiment as report

            page = report.run([experiment], None)
        else:
            from pipeline.report.page import write_report

            page = write_report([experiment], experiment / "report.html")
        print(f"report: {page}")
    except Exception as error:  # the stage is complete even if its report fails
        print(f"no report: {type(error).__name__}: {error}", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Run `python -m launchers.job LOGS SRUN_CODE MAX_REQUEUES` and return the job's exit code."""
    logs, srun_code, max_requeues = arguments
    return conclude(Path(logs), int(srun_code), int(max_requeues))


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
