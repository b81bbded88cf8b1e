"""Questions to SLURM, through the commands that every cluster has. Nothing here needs accounting (sacct) to be set up."""

import re
import shutil
import subprocess
from typing import NamedTuple

from pipeline.errors import EnvironmentProblem

FORGOTTEN = "Invalid job id"  # scontrol's words; any other failure of it is no answer at all
HOPELESS = "DependencyNeverSatisfied"  # a reason to be PENDING that will not pass
ACTIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED")
_FIELD = re.compile(r"(?:^| )([A-Za-z]+)=(\S*)")


class JobState(NamedTuple):
    """What SLURM says of one job; `state` is UNKNOWN once it has forgotten it."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    exit_code: int = 0

    @property
    def active(self) -> bool:
        """Whether it runs, or will."""
        return self.state in ACTIVE and self.reason != HOPELESS


def available() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("scontrol") is not None


def ask(*command: str) -> str:
    """The output of a SLURM command. Raises EnvironmentProblem with SLURM's own words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(
            f"{command[0]} cannot be asked ({error}); is this a login node of the cluster?"
        ) from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise EnvironmentProblem(f"{' '.join(command[:3])}: {words[-1]}")
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """The Key=value pairs of one line of `scontrol -o show`."""
    return dict(_FIELD.findall(line))


def job_state(job_id: str) -> JobState:
    """Of a job or of one task of an array; from slurmctld while it remembers the job, from accounting after that.

    Raises EnvironmentProblem where SLURM does not answer: a job of which nothing is heard may well run.
    """
    try:
        found = fields(ask("scontrol", "-o", "show", "job", job_id).splitlines()[0])
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
    """Back into the queue under the same id, so that jobs that depend on it keep waiting."""
    ask("scontrol", "requeue", job_id)
