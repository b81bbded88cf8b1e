"""The state of every stage of an experiment: queued, running, failed and why, complete, and from which parents.

It is read from the run folders (status.json, heartbeats, metrics, exports) and from SLURM, if a job was submitted.
"""

import fcntl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launchers import queue
from launchers.queue import JobState
from launchers.slurm import record
from pipeline.books import read_status
from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.exports.card import CARD, Card
from pipeline.jsonl import newest, read_object, read_rows
from pipeline.train.run import HEARTBEAT
from stages import SPECS

AGAIN = "submit the chain again to run it"
# A run without a heartbeat for SILENT_SECONDS plus the time of BEATS of its steps counts as hanging.
SILENT_SECONDS, BEATS = 120.0, 100


class Row(NamedTuple):
    """The state of one stage.

    Attributes:
        state: complete, running, starting, queued, interrupted, failed, not run, silent or absent.
        words: The details.
    """

    state: str
    words: str


def show(root: Path, experiments: Sequence[str]) -> int:
    """Print one line per stage.

    Args:
        root: The folder of all runs.
        experiments: The experiments to show; none = all.

    Raises:
        ConfigError: There is no such experiment.
    """
    known = sorted(
        {p.parent.parent.name for p in root.glob("*/*/status.json")} | {p.parent.name for p in root.glob("*/slurm")}
    )
    missing = [name for name in experiments if name not in known]
    if not known:
        raise ConfigError(f"there is no experiment in {root}; start one, or name the folder of the runs with --root")
    if missing:
        raise ConfigError(f"there is no experiment {', '.join(missing)} in {root}; it has {', '.join(known)}")
    for name in experiments or known:
        for stage in SPECS:
            row = read_stage(root / name / stage)
            if row.state != "absent":
                print(f"{name + '/' + stage:32s} {row.state:12s} {row.words}")
    return 0


def read_stage(run: Path) -> Row:
    """Find out the state of the stage with the run folder `run`."""
    status = read_status(run)
    told = record(run)
    if status.get("state") == "complete" and (run / "export" / CARD).is_file():
        early = ", ended early" if status["step"] < status["steps"] else ""
        return Row("complete", f"step {status['step']} of {status['steps']}{early}; {_lineage(run)}")
    job = _ask(told.get("job"))
    where = f"job {told['job']}{_place(job)}" if told else ""
    if job.active and job.state != "RUNNING":
        again = f", requeued {job.restarts} times" if job.restarts else ""
        waits = f"waits for job {told['after']}" if job.reason == "Dependency" else job.reason
        return Row("queued", f"{where} {waits or job.state.lower()}{again}{_reached(status)}")
    if job.active and not status:
        return Row("starting", where)
    if told and not job.active and job.state != "UNKNOWN" and (not status or job.reason == queue.HOPELESS):
        return _never_started(told, job, where)
    if not status:
        return Row("absent", "") if not told else Row("not run", f"{where} wrote nothing, and {job.reason}")
    return _of_status(run, status, told, job, where)


def _ask(job_id: str | None) -> JobState:
    """Ask SLURM for a job's state; UNKNOWN with the reason if it has none."""
    if not job_id or not queue.available():
        return JobState("UNKNOWN", "SLURM is not installed here")
    try:
        job = queue.job_state(job_id)
    except EnvironmentProblem:
        return JobState("UNKNOWN", "SLURM does not respond")
    return job._replace(reason="SLURM has forgotten it") if job.state == "UNKNOWN" else job


def _never_started(told: dict[str, Any], job: JobState, where: str) -> Row:
    if job.state == "CANCELLED" or job.reason == queue.HOPELESS:
        earlier = _ask(told["after"])
        if earlier.active:
            return Row("not run", f"{where} was cancelled, but job {told['after']}, its parent, continues; {AGAIN}")
        if earlier.state in ("COMPLETED", "UNKNOWN"):
            return Row("not run", f"{where} was cancelled before it started; {AGAIN}")
        why = f"job {told['after']}, which it needs, did not complete"
        return Row("not run", f"{where} was removed from the queue: {why}")
    return Row(
        "failed", f"{where}: {job.state} with exit code {job.exit_code}; see {told['logs']}/{told['job']}_0_log.err"
    )


def _of_status(run: Path, status: dict[str, Any], told: dict[str, Any], job: JobState, where: str) -> Row:
    reached = _reached(status)
    if status["state"] == "failed" and not job.active:
        return Row("failed", f"{status['reason']}{'; ' + where if where else ''}")
    age = _heartbeat_age(run, status)
    step_seconds = _last(run, "perf/step_seconds")
    if status["state"] == "running" or job.active:
        left = status.get("steps", 0) - status.get("step", 0)
        eta = _clock(left * step_seconds) if step_seconds else "unknown"  # no row of the log is there yet
        words = f"{reached.removeprefix('; ')}, eta {eta}, last heartbeat {_clock(age)} ago"
        words += f", {where}" if where else ""
        fresh = age <= SILENT_SECONDS + BEATS * step_seconds
        unsure = bool(told) and job.state == "UNKNOWN"
        words += f", {job.reason}" if unsure else ""
        # The lock of a run on another machine is not seen here: if SLURM does not know the job, its heartbeat decides.
        if not (job.active or _held(run) or (unsure and fresh)):
            ended = f", which is {job.state}" if told and not unsure else ""
            return Row("silent", f"{words}{ended}: it ended without a message; start it again to continue")
        if not fresh:
            return Row("silent", f"{words}: a rank hangs; the run ends with exit code 7 after engine.timeout_seconds")
        return Row("running", words)
    ended = f"; {where} {_verdict(told)}" if told else ""
    return Row(status["state"], f"everything is saved{reached}; start it again to continue{ended}")


def _lineage(run: Path) -> str:
    """Name the weights and their parents, and say if a parent has been trained again since."""
    try:
        card = Card.read(run / "export")
    except HandoverError as error:
        return str(error)
    words = [f"weights {card.weights_sha256[:12]}"]
    for parent in card.lineage.parents:
        words.append(f"{parent.role} {Path(parent.path).parent.name} {parent.weights_sha256[:12]}")
        now = read_object(Path(parent.path) / CARD).get("weights_sha256", parent.weights_sha256)
        if now != parent.weights_sha256:
            words[-1] += f" (STALE: the parent holds {now[:12]} now)"
    return ", ".join(words)


def _place(job: JobState) -> str:
    return f" on {job.nodes}" * bool(job.nodes) + f" (start {job.restarts + 1})" * bool(job.restarts)


def _reached(status: dict[str, Any]) -> str:
    if not status.get("steps"):
        return ""
    return f"; step {status['step']} of {status['steps']} ({100 * status['step'] / status['steps']:.0f} %)"


def _heartbeat_age(run: Path, status: dict[str, Any]) -> float:
    """Seconds since all ranks were last seen alive, at a vote."""
    beat = run / HEARTBEAT
    return time.time() - max(beat.stat().st_mtime if beat.is_file() else 0.0, status["time"])


def _held(run: Path) -> bool:
    """Whether a process on this machine works in the folder: then it holds the lock."""
    try:
        with (run / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _last(run: Path, name: str) -> float:
    found = newest(read_rows(run / "metrics.jsonl", "step"), name)
    return float(found) if isinstance(found, int | float) else 0.0


def _verdict(told: dict[str, Any]) -> str:
    """How the last start of the job ended, and what followed."""
    path = Path(told["logs"]) / told["job"] / "verdicts.jsonl"
    rows = [row for row in read_rows(path) if "code" in row and "then" in row]
    return f"ended with {rows[-1]['code']}: {rows[-1]['then']}" if rows else "has no verdict yet"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
