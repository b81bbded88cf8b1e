"""Checks whether this machine, and the cluster if there is one, can run a chain: each line is OK or says what to do.

The checks try things instead of looking them up: kernels are compared with the reference, files are renamed while they are
read, two processes sum a tensor. On a cluster the ranks of the preset also look at the compute nodes (`node_check.py`).
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from launchers import preflight, queue
from launchers.chain import Step
from launchers.config import ClusterConfig
from launchers.filesystem import RENAMES, locks, renames_seen_halfway
from launchers.local import spawn
from pipeline.errors import PipelineError
from pipeline.exit_codes import ExitCode
from pipeline.train.gpus import Torch, broken_promise, driver, why_none
from stages import spec_of

REQUIREMENTS, DISTRIBUTION = Path("requirements.txt"), "visionmamba-pipeline"
MAX_SKEW_SECONDS = 5.0
IMMEDIATE_SECONDS = 30  # how long srun waits for free nodes
_SUM = """
import sys, torch, torch.distributed as dist
dist.init_process_group(sys.argv[1])
if sys.argv[1] == "nccl":
    torch.cuda.set_device(dist.get_rank())
x = torch.ones(1000, device="cuda" if sys.argv[1] == "nccl" else "cpu")
dist.all_reduce(x)
dist.destroy_process_group()
sys.exit(not bool((x == 2).all()))
"""


class Finding(NamedTuple):
    """One line of the doctor.

    Attributes:
        what: What was checked, and what was found.
        remedy: What to do; empty if all is well.
        needed: Whether the pipeline cannot do without it.
    """

    what: str
    remedy: str = ""
    needed: bool = True


def run(steps: Sequence[Step], cluster: ClusterConfig) -> int:
    """Run all checks and print one line for each finding.

    Returns:
        0, or 5 if something that is needed fails.
    """
    root = steps[0].config.run.root
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        packages,
        devices,
        kernels,
        communication,
        lambda: disk(root),
        lambda: data(steps),
        lambda: slurm(steps, cluster),
        lambda: compute_nodes(cluster),
    )
    failed = False
    for check in checks:
        for finding in check():
            mark = "OK     " if not finding.remedy else "PROBLEM" if finding.needed else "without"
            print(f"{mark}  {finding.what}{': ' + finding.remedy if finding.remedy else ''}", flush=True)
            failed |= bool(finding.remedy) and finding.needed
    return ExitCode.ENVIRONMENT if failed else ExitCode.COMPLETE


def packages() -> Iterator[Finding]:
    """Check Python, the pinned packages and the C++ compiler."""
    yield Finding(
        f"Python {sys.version.split()[0]}",
        "" if (3, 11) <= sys.version_info[:2] <= (3, 13) else "install Python 3.11, 3.12 or 3.13",
    )
    wrong = []
    pins = _pins()
    for name, pin in pins.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "absent"
        if re.sub(r"\+.*", "", found) != pin:
            wrong.append(f"{name} {found} instead of {pin}")
    remedy = (
        f"pip install -r {REQUIREMENTS}" if REQUIREMENTS.exists() else f"pip install --force-reinstall {DISTRIBUTION}"
    )
    yield Finding(f"{len(pins)} pinned packages", f"{', '.join(wrong)}; {remedy}" if wrong else "")
    compiler = shutil.which("g++") or shutil.which("c++")
    yield Finding(
        "a C++ compiler",
        "" if compiler else "missing: apt-get install g++; without it the scan on a CPU is slow",
        needed=False,
    )


def _pins() -> dict[str, str]:
    """Read the pins of a checkout, or of the installed package."""
    try:
        lines = (
            REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else metadata.requires(DISTRIBUTION) or []
        )
    except metadata.PackageNotFoundError:
        lines = []
    found = (line.partition("==") for line in lines if "==" in line and ";" not in line)
    return {name.strip(): pin.strip() for name, _, pin in found if not name.startswith("#")}


def devices() -> Iterator[Finding]:
    """List the GPUs that torch sees."""
    import torch

    if not torch.cuda.is_available():
        build = Torch(torch.__version__, torch.version.cuda)
        wrong = broken_promise(build, os.environ)
        without = f"torch sees none, so everything runs on the CPU ({why_none(build, driver())})"
        yield Finding("GPUs", wrong or without, needed=bool(wrong))
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Finding(f"GPU {i}: {about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")


def kernels() -> Iterator[Finding]:
    """Compare every kernel of the scan with the reference."""
    import torch

    from pipeline.ops import choice

    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        for name, error, words in choice.report(device):
            what = f"scan on {device}: {name}"
            broken = words.startswith("FAILS")
            yield (
                Finding(f"{what}, relative error {error:.0e}")
                if error is not None
                else Finding(what, words, needed=broken)
            )


def communication() -> Iterator[Finding]:
    """Let two processes sum a tensor, and look for free ports."""
    import torch
    import torch.distributed as dist

    backends = ["gloo"]
    if torch.cuda.device_count() > 1:
        backends.append("nccl")
    elif torch.cuda.is_available():
        version = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "absent"
        yield Finding(f"NCCL {version}", "not tried: that needs two GPUs", needed=False)
    for backend in backends:
        code = spawn([sys.executable, "-c", _SUM, backend], 2)
        yield Finding(
            f"two processes sum a tensor over {backend}",
            f"they ended with exit code {code}; their messages are above" if code else "",
        )
    low, high = 20_000, 32_000  # where pipeline.train.distributed puts the ports of SLURM's jobs
    taken = sum(not _free(port) for port in range(low, high, 100))
    share = taken / ((high - low) / 100)
    yield Finding(f"ports {low} to {high}", f"{100 * share:.0f} % are taken on this machine" if share > 0.1 else "")


def _free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
    return True


def disk(root: Path) -> Iterator[Finding]:
    """Check the folder of the runs: free space, atomic renames, locks and its clock."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".doctor-") as name:
            folder = Path(name)
            free = shutil.disk_usage(folder).free / 1e9
            yield Finding(
                f"{root}: {free:.0f} GB free",
                "free some space; `python -m launchers plan` says how much is needed" if free < 5 else "",
            )
            gaps = renames_seen_halfway(folder)
            remedy = f"a reader saw {gaps} of {RENAMES} half done; put run.root on another file system" if gaps else ""
            yield Finding(f"{root}: {RENAMES} renames while the file is read", remedy)
            yield Finding(
                f"{root}: locks",
                ""
                if locks(folder)
                else "flock does not keep a second process out; take care to start each run only once",
            )
            (folder / "clock").touch()
            skew = abs((folder / "clock").stat().st_mtime - time.time())
            yield Finding(
                f"{root}: its clock differs from this machine's by {skew:.1f} s",
                "synchronise the clocks (NTP): heartbeats are compared with them" if skew > MAX_SKEW_SECONDS else "",
            )
    except OSError as error:
        yield Finding(f"{root}", f"cannot be written ({error.strerror}); choose another run.root")


def data(steps: Sequence[Step]) -> Iterator[Finding]:
    """Open the data of every stage, and look for the files of weights from outside."""
    from stages.check import open_data
    from stages.spec import in_words

    for step in steps:
        try:
            data = open_data(step.config)
        except PipelineError as error:
            yield Finding(f"data of {step.stage}", str(error))
        else:
            images = f"{data.manifest.num_samples} images in {data.manifest}"
            yield Finding(f"data of {step.stage}: {images}; {in_words(data.labels())}")
        for key, path in spec_of(step.config).foreign_files(step.config).items():
            missing = "the file is missing; put it there: nothing is downloaded"
            yield Finding(f"{key} = {path}", "" if path.is_file() else missing)


def slurm(steps: Sequence[Step], cluster: ClusterConfig) -> Iterator[Finding]:
    """Check the preset against the cluster, if this is a machine of one."""
    if not queue.available():
        yield Finding("SLURM", "not installed here; `python -m launchers local` and torchrun work", needed=False)
        return
    try:
        told = dict(re.findall(r"^(\w+)\s*= (.*)$", queue.ask("scontrol", "show", "config"), re.MULTILINE))
    except PipelineError as error:
        yield Finding("SLURM", str(error), needed=False)
        return
    try:
        preflight.check_partition(cluster)
        for step in steps:
            preflight.check_shared(step, cluster)
    except PipelineError as error:
        yield Finding("SLURM", str(error))
        return
    yield Finding(f"SLURM {told.get('SLURM_VERSION', '')}, partition {cluster.partition or '(the default)'}")
    wait = int(told.get("KillWait", "30 sec").split()[0])
    yield Finding(
        f"SLURM gives {wait} s between a preemption's SIGTERM and the kill",
        "a save may not fit into that time, and work since the last one is then lost; lower loop.save_every"
        if wait < 30
        else "",
        needed=False,
    )
    if not cluster.shared:
        remedy = "none are listed in the preset, so paths are not checked; list the folders that every node sees under `shared`"
        yield Finding("shared folders", remedy, needed=False)


def compute_nodes(cluster: ClusterConfig) -> Iterator[Finding]:
    """Let all ranks of the preset look at their nodes and sum a tensor, if the nodes are free at once."""
    if not queue.available():
        return
    try:
        preflight.check_partition(cluster)
    except PipelineError:  # `slurm` has said so
        return
    asked = {
        "immediate": IMMEDIATE_SECONDS,
        "job-name": "doctor",
        "time": "5",  # minutes
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "gpus-per-node": cluster.gpus_per_node or None,
        "kill-on-bad-exit": "1",
        **{name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint")},
        **cluster.extra,
    }
    command = ["srun", *(f"--{name}={value}" for name, value in asked.items() if value is not None)]
    shell = [*cluster.setup, f"exec {shlex.quote(sys.executable)} -m launchers.node_check"]
    try:
        done = subprocess.run(
            [*command, "bash", "-c", "\n".join(shell)],
            capture_output=True,
            text=True,
            check=False,
            timeout=10 * IMMEDIATE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "compute nodes", "srun did not return; look at `squeue` for the job doctor, and end it with scancel"
        )
        return
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for what, remedy in lines:
        yield Finding(what, remedy)
    if not lines:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        busy = "immediate" in done.stderr.lower() or "busy" in done.stderr.lower()
        how = (
            f"not tried: none was free within {IMMEDIATE_SECONDS} s ({words}); try again when the cluster is less busy"
        )
        yield Finding("compute nodes", how if busy else f"srun ended with {done.returncode}: {words}", needed=not busy)
