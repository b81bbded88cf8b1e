"""GPUs that were promised and are not seen: training must never move to the CPU of a GPU node in silence (torch-free).

torch falls back to the CPU where the driver is missing or too old, or where its wheel is built for CPUs. SLURM's variables
say what a job was given: `SLURM_GPUS_PER_NODE` is the preset's `gpus_per_node`, the others what the node gave.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DRIVER_FILE = Path("/proc/driver/nvidia/version")
COUNTS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")
LISTS = ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
# The oldest driver that runs programs of a major version of CUDA, and the builds of torch for an older driver.
OLDEST_DRIVER = {12: 525, 13: 580}
BUILDS = ("cu126", "cu128")
# For PYTHONWARNINGS: torch says only in a warning that it found a driver and cannot use it.
QUIET_BUT_FOR_CUDA = "ignore,default:CUDA initialization"


class Torch(NamedTuple):
    """What decides whether a build of torch can use a GPU.

    Attributes:
        version: `torch.__version__`.
        cuda: `torch.version.cuda`, such as "13.0"; None for a build without CUDA.
    """

    version: str
    cuda: str | None


def promise(environment: Mapping[str, str]) -> str:
    """Return the variable that promises GPUs, as NAME=VALUE; empty if none does, or if `CUDA_VISIBLE_DEVICES` hides them."""
    # CUDA_VISIBLE_DEVICES can hide GPUs, but it promises none: DeepSpeed's launcher sets it on machines without GPUs too.
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ""
    given = {name: environment.get(name, "").strip() for name in (*LISTS, *COUNTS)}
    none = {**dict.fromkeys(LISTS, ("", "-1", "NoDevFiles", "(null)")), **dict.fromkeys(COUNTS, ("", "0"))}
    return next((f"{name}={value}" for name, value in given.items() if value not in none[name]), "")


def driver(file: Path = DRIVER_FILE) -> str | None:
    """Return the version of this machine's NVIDIA driver, such as "535.104.05"; None without one."""
    try:
        text = file.read_text()
    except OSError:
        text = _asked_nvidia_smi()
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found.group() if found else None


def _asked_nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def why_none(torch: Torch, version: str | None) -> str:
    """Say why torch sees no GPU, and what to do.

    Args:
        torch: The build of torch.
        version: The driver's version, or None.
    """
    built = (
        f"torch {torch.version} is built for CUDA {torch.cuda}"
        if torch.cuda
        else f"torch {torch.version} is a CPU build"
    )
    has = f"driver {version}" if version else "no driver"
    builds = " or ".join(f"TORCH_INDEX={build}" for build in BUILDS)
    if version is None:
        remedy = "choose nodes with GPUs and NVIDIA's driver"
    elif torch.cuda is None:
        remedy = f"install a CUDA build in a fresh checkout: make install {builds} (docs/install.md)"
    elif int(version.split(".")[0]) < (oldest := OLDEST_DRIVER.get(int(torch.cuda.split(".")[0]), 0)):
        remedy = (
            f"CUDA {torch.cuda} needs driver {oldest} or newer: install a build for this driver in a fresh checkout,"
            f" make install {builds} (docs/install.md), or a newer driver"
        )
    else:
        remedy = "the driver is new enough: look with nvidia-smi whether this process may use the GPUs"
    return f"{has}, {built}; {remedy}"


def broken_promise(torch: Torch, environment: Mapping[str, str]) -> str:
    """Say what is wrong if GPUs were promised and torch sees none; empty if nothing was promised."""
    if not (promised := promise(environment)):
        return ""
    return (
        f"GPUs were promised ({promised}), but torch sees none: {why_none(torch, driver())}."
        " To train on the CPU, set CUDA_VISIBLE_DEVICES= (on SLURM: cluster:gpus_per_node=0)"
    )
