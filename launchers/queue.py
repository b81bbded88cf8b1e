"""Questions to SLURM, through the commands that every cluster has. Accounting (sacct) is not needed."""

import re
import shutil
import subprocess
from typing import NamedTuple

from pipeline.errors import EnvironmentProblem

FORGOTTEN = "Invalid job id"  # scontrol's words for a job that is gone; any other failure says nothing about the job
HOPELESS = "DependencyNeverSatisfied"  # a job that is PENDING for this reason will never start
ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED")
_FIELD = re.compile(r"(?:^| )([A-Za-z]+)=(\S*)")


class JobState(NamedTuple):
    """What SLURM says about one job. `state` is UNKNOWN for a job that SLURM has forgotten."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    exit_code: int = 0

    @property
    def active(self) -> bool:
        """Whether the job runs or will run."""
        return self.state in ACTIVE and self.reason != HOPELESS


def available() -> bool:
    """Find out whether SLURM's commands are installed here."""
    return shutil.which("sbatch") is not None and shutil.which("scontrol") is not None


def ask(*command: str) -> str:
    """Run a SLURM command and return its output.

    Raises:
        EnvironmentProblem: The command is missing, fails or takes longer than a minute; with SLURM's own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(
            f"{command[0]} cannot be run ({error}); run this on a login node of the cluster"
        ) from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise EnvironmentProblem(f"{' '.join(command[:3])}: {words[-1]}")
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """Read the Key=value pairs of one line of `scontrol -o show`."""
    return dict(_FIELD.findall(line))


def job_state(job_id: str) -> JobState:
    """Ask for the state of a job or of one task of an array: slurmctld first, and accounting if that has forgotten it.

    Raises:
        EnvironmentProblem: SLURM does not respond. The job may well be running.
    """
    try:
        found = fields(ask("scontrol", "-o", "show", "job", job_id).partition("\n")[0])
    except EnvironmentProblem as error:
        if FORGOTTEN not in str(error):
            raise
        return _from_accounting(job_id)
    return JobState(
        state=found.get("JobState", "UNKNOWN"),
        reason=found.get("Reason", "").replace("None", ""),
        nodes=found.get("NodeList", "").replace("(null)", ""),
        restarts=int(found.get("Restarts", "0")),
        exit_code=int(found.get("ExitCode", "0:0").split(":")[0]),
    )


def _from_accounting(job_id: str) -> JobState:
    try:
        text = ask("sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State,ExitCode")
        state, _, code = text.splitlines()[-1].partition("|")
    except (EnvironmentProblem, IndexError):
        return JobState("UNKNOWN")
    return JobState(state=state.split()[0], exit_code=int(code.split(":")[0]))


def requeue(job_id: str) -> None:
    """Put a job back into the queue under the same id, so that the jobs that depend on it keep waiting."""
    ask("scontrol", "requeue", job_id)
