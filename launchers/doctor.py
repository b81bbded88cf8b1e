"""Whether this machine, and the cluster if one is near, can run a chain: each line OK, or what to do.

Everything is tried, not looked up: kernels are compared with the reference, files are renamed under a reader, two
processes sum a tensor.
"""

import re
import shutil
import socket
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
from pipeline.errors import EnvironmentProblem, PipelineError
from stages import spec_of

REQUIREMENTS = Path("requirements.txt")
MAX_SKEW_SECONDS = 5.0
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
    """`remedy` is empty where all is well; `needed` false where the pipeline does without."""

    what: str
    remedy: str = ""
    needed: bool = True


def run(steps: Sequence[Step], cluster: ClusterConfig) -> int:
    """Print a line a finding; returns 0, or 5 if something needed is not well."""
    root = steps[0].config.run.root
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        packages,
        devices,
        kernels,
        communication,
        lambda: disk(root),
        lambda: data(steps),
        lambda: cluster_near(steps, cluster),
    )
    ill = False
    for check in checks:
        for finding in check():
            mark = "OK     " if not finding.remedy else "PROBLEM" if finding.needed else "without"
            print(f"{mark}  {finding.what}{': ' + finding.remedy if finding.remedy else ''}", flush=True)
            ill |= bool(finding.remedy) and finding.needed
    return EnvironmentProblem.exit_code if ill else 0


def packages() -> Iterator[Finding]:
    yield Finding(
        f"Python {sys.version.split()[0]}",
        "" if sys.version_info[:2] in ((3, 11), (3, 12)) else "3.11 or 3.12 is needed",
    )
    wrong = []
    pins = [line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line]
    for name, pin in pins:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "absent"
        if re.sub(r"\+.*", "", found) != pin:
            wrong.append(f"{name} {found} instead of {pin}")
    yield Finding(f"{len(pins)} pinned packages", f"{', '.join(wrong)}; pip install -r {REQUIREMENTS}" if wrong else "")
    compiler = shutil.which("g++") or shutil.which("c++")
    yield Finding(
        "a C++ compiler", "" if compiler else "apt-get install g++; the CPU scan is slow without", needed=False
    )


def devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPUs", f"none seen by torch {torch.__version__}; everything runs on the CPU", needed=False)
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Finding(f"GPU {i}: {about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")


def kernels() -> Iterator[Finding]:
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
    import torch
    import torch.distributed as dist

    backends = ["gloo"]
    if torch.cuda.device_count() > 1:
        backends.append("nccl")
    elif torch.cuda.is_available():
        version = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "absent"
        yield Finding(f"NCCL {version}", "it is tried where there are two GPUs", needed=False)
    for backend in backends:
        code = spawn([sys.executable, "-c", _SUM, backend], 2)
        yield Finding(
            f"two processes sum a tensor over {backend}", f"they ended with {code}; see above" if code else ""
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
    """Where the runs will lie: room, renames that nobody sees halfway, locks, and its clock."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".doctor-") as name:
            folder = Path(name)
            free = shutil.disk_usage(folder).free / 1e9
            yield Finding(
                f"{root}: {free:.0f} GB free", "make room: a plan says how much is needed" if free < 5 else ""
            )
            gaps = renames_seen_halfway(folder)
            remedy = f"a reader saw {gaps} of {RENAMES} halfway; put run.root on another file system" if gaps else ""
            yield Finding(f"{root}: {RENAMES} renames under a reader", remedy)
            yield Finding(
                f"{root}: locks", "" if locks(folder) else "flock does not exclude there; start each run once only"
            )
            (folder / "clock").touch()
            skew = abs((folder / "clock").stat().st_mtime - time.time())
            yield Finding(
                f"{root}: its clock is {skew:.1f} s from ours",
                "set the clocks (NTP): heartbeats are compared with them" if skew > MAX_SKEW_SECONDS else "",
            )
    except OSError as error:
        yield Finding(f"{root}", f"cannot be written ({error.strerror}); choose another run.root")


def data(steps: Sequence[Step]) -> Iterator[Finding]:
    from stages.check import open_data

    for step in steps:
        try:
            manifest, _, subsets = open_data(step.config)
        except PipelineError as error:
            yield Finding(f"data of {step.stage}", str(error))
        else:
            yield Finding(f"data of {step.stage}: {manifest.num_samples} images, {len(subsets.labelled)} labelled")
        for key, path in spec_of(step.config).foreign_files(step.config).items():
            missing = "the file is missing; put it there: nothing is downloaded"
            yield Finding(f"{key} = {path}", "" if path.is_file() else missing)


def cluster_near(steps: Sequence[Step], cluster: ClusterConfig) -> Iterator[Finding]:
    if not queue.available():
        yield Finding("SLURM", "no sbatch here; `local` and torchrun work", needed=False)
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
    yield Finding(f"SLURM {told.get('SLURM_VERSION', '')}, partition {cluster.partition or 'by default'}")
    wait = int(told.get("KillWait", "30 sec").split()[0])
    yield Finding(
        f"SLURM gives {wait} s between a preemption's SIGTERM and the kill",
        "work since the last save may be lost then; lower loop.save_every" if wait < 30 else "",
        needed=False,
    )
    if not cluster.shared:
        remedy = "list the folders that every node sees under shared in the preset, so that others are refused"
        yield Finding("shared folders", remedy, needed=False)
