"""A real SLURM of a few nodes on this machine, thrown away after the tests: slurmctld, and a slurmd per node.

Each slurmd lives in namespaces of its own (host name, mounts, processes), so a node has a name that only its jobs can
resolve, and killing one process kills the node with all that runs on it. Needs root and Debian's slurm-wlm; no systemd,
no munge, no accounting. Jobs of one cluster can pose as any user: for tests only.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from launchers import queue
from launchers.queue import JobState
from tests.waiting import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
WAIT_SECONDS = 60.0  # on the reference machine, see tests/waiting.py

_CONF = """ClusterName=lab
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
# A requeued job waits until its old credentials are void: 120 s unless told otherwise, 5 at least.
AuthInfo=cred_expire=5
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=5
KillWait=3
MinJobAge=3600
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=7-00:00:00 State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=1:00:00 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=closed Nodes=ALL MaxTime=0 State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1"
    " CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
)
# GPUs in SLURM's books alone: a node promises eight, and no process sees one.
_GRES = "NodeName={names} Name=gpu File={folder}/gpu[0-7]\n"
# In a namespace: its name, its own view of /etc/hosts and /proc, then slurmd; children that slurmd leaves are reaped.
_BOOT = """hostname "$1"; mount --bind "$2/hosts" /etc/hosts
slurmd -D -c -N "$1" -f "$2/slurm.conf" & wait; while wait -n; do :; done"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    if os.geteuid():
        return "a throw-away SLURM needs root (namespaces for its nodes)"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm"
    try:
        done = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"], check=False)
    except OSError:
        return "unshare cannot be run"
    return "" if done.returncode == 0 else "this container may not make namespaces"


class Cluster:
    """`with Cluster(folder) as cluster:` has its nodes ready; while inside, SLURM's commands speak to it."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.names = folder, [f"node{i + 1}" for i in range(nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._conf = os.environ.get("SLURM_CONF")

    def __enter__(self) -> "Cluster":
        (self.folder / "state").mkdir(parents=True)
        ports = _free_ports(len(self.names) + 1)
        nodes = [_NODE.format(name=name, port=port) for name, port in zip(self.names, ports[1:], strict=True)]
        text = _CONF.format(
            first_job=int(time.time()) % 50_000_000 + 1,  # ids that no other cluster here has used
            host=socket.gethostname().split(".")[0],
            port=ports[0],
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(_GRES.format(names=",".join(self.names), folder=self.folder))
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        hosts = "".join(f"127.0.0.1 {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf")])
        for name in self.names:
            self.start_node(name)
        self.until(lambda: self._idle() == set(self.names), "the nodes to be ready")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user=root"], check=False, timeout=10, capture_output=True)
        for name in list(self._daemons):
            self.kill_node(name)
        if self._conf is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = self._conf

    @contextmanager
    def silent_controller(self) -> Iterator[None]:
        """While inside, slurmctld answers nobody, as when it is busy or its disk hangs."""
        daemon = self._daemons["slurmctld"]
        daemon.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            daemon.send_signal(signal.SIGCONT)

    def verdict_begins(self) -> bool:
        """Whether srun has returned somewhere and the batch script asks what follows."""
        return any("launchers.job" in (process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))

    def start_node(self, name: str) -> None:
        space = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._start(name, [*space, "bash", "-c", _BOOT, "_", name, str(self.folder)])

    def kill_node(self, name: str) -> None:
        """Everything on it dies at once, and nobody is told."""
        daemon = self._daemons.pop(name)
        below = psutil.Process(daemon.pid).children()
        for process in below:  # the first process of the namespace: the kernel ends the others with it
            process.send_signal(signal.SIGKILL)
        daemon.kill()
        daemon.wait()

    def job(self, job_id: str) -> JobState:
        return queue.job_state(job_id)

    def until(self, condition, what: str, seconds: float = WAIT_SECONDS) -> None:
        wait_until(condition, what, seconds, every=0.05, context=self.told)

    def ended(self, job_id: str, seconds: float = WAIT_SECONDS) -> JobState:
        self.until(lambda: not self.job(job_id).active, f"job {job_id} to end", seconds)
        return self.job(job_id)

    def told(self) -> str:
        done = subprocess.run(["squeue", "-l"], capture_output=True, text=True, check=False)
        log = self.folder / "slurmctld.log"
        return done.stdout + "\n".join(log.read_text().splitlines()[-15:])

    def _idle(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, check=False
        )
        return set(done.stdout.split())

    def _start(self, name: str, command: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
