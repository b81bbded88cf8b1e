"""What the doctor tries on the compute nodes, through srun with one task per rank; the first prints findings as JSON lines.

Each rank looks at its GPU (driver, ECC errors, clocks), at the shared memory of its node, times a matrix product, and sums a
tensor with all others over NCCL, or over gloo without GPUs. A GPU that is much slower than the others is named.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.cli import guarded
from pipeline.errors import first_line
from pipeline.train.gpus import Torch, broken_promise, driver
from pipeline.train.rendezvous import keep_to_the_ranks, open_store, rendezvous

# A GPU below this share of the median speed is named. The threshold is ours.
LEAST_SPEED = 0.9
LEAST_SHARED_GB = 1.0  # data workers hand over batches through /dev/shm
TIMEOUT = timedelta(seconds=120)
_QUERY = (
    "ecc.errors.uncorrected.volatile.total", "clocks.sm", "clocks.max.sm", "clocks_throttle_reasons.hw_slowdown",
    "temperature.gpu",
)  # fmt: skip
_SIDE, _TIMES = 4096, 20


def told_by_driver(gpu: int) -> dict[str, str]:
    """Ask nvidia-smi about a GPU; empty where it is missing or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--id={gpu}", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    words = [word.strip() for word in done.stdout.split(",")]
    return dict(zip(_QUERY, words, strict=True)) if done.returncode == 0 and len(words) == len(_QUERY) else {}


def wrong_with(gpu: dict[str, str]) -> list[str]:
    """Say what is wrong with a GPU by what `told_by_driver` has returned."""
    found = []
    if gpu.get(_QUERY[0], "0") not in ("0", "[N/A]", "N/A"):
        found.append(f"{gpu[_QUERY[0]]} uncorrected ECC errors: drain the node")
    if gpu.get(_QUERY[3]) == "Active":
        found.append(f"the hardware slows it down at {gpu[_QUERY[4]]} C: look at its cooling and power")
    return found


def slow_ones(speeds: Sequence[float]) -> list[int]:
    """Return the ranks whose speed is below `LEAST_SPEED` of the median."""
    median = statistics.median(speeds)
    return [rank for rank, speed in enumerate(speeds) if speed < LEAST_SPEED * median]


def _look(local_rank: int) -> dict[str, Any]:
    """What one rank sees without the others."""
    import torch

    node = socket.gethostname()
    found: dict[str, Any] = {"node": node, "problems": [], "speed": 0.0, "gpu": ""}
    shared = shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").is_dir() else 0.0
    found["shared_gb"] = shared
    if shared < LEAST_SHARED_GB:
        found["problems"].append(
            f"/dev/shm of {node} has {shared:.2g} GB; data workers need {LEAST_SHARED_GB:g} or more"
        )
    if wrong := broken_promise(Torch(torch.__version__, torch.version.cuda), os.environ):
        found["problems"].append(f"{node}: {wrong}")
    elif torch.cuda.is_available():
        index = local_rank if local_rank < torch.cuda.device_count() else 0
        torch.cuda.set_device(index)
        about = told_by_driver(index)
        found["problems"] += [f"GPU {index} of {node}: {words}" for words in wrong_with(about)]
        found["gpu"] = f"{torch.cuda.get_device_name(index)}, driver {driver()}, {about.get(_QUERY[1], '?')} of"
        found["gpu"] += f" {about.get(_QUERY[2], '?')} MHz"
    found["speed"] = _products_per_second(torch)
    return found


def _products_per_second(torch: Any) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, times = (_SIDE, _TIMES) if device == "cuda" else (256, 5)
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(times):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(times / (time.perf_counter() - begin))
    return max(rates)


def main(arguments: Sequence[str]) -> int:
    """Look at this rank's node, meet the others, and let rank 0 print the findings; returns 0 whatever they are."""
    import torch
    import torch.distributed as dist

    del arguments
    found = rendezvous(os.environ)
    keep_to_the_ranks(found, public_address=False)
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    own = _look(int(found["LOCAL_RANK"]))
    store = open_store(found, TIMEOUT)
    assert store is not None  # srun starts the ranks, not torchrun
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    everyone: list[dict[str, Any]] = [{}] * size
    dist.all_gather_object(everyone, own)
    gpus = all(each["gpu"] for each in everyone)
    summed = _sum(dist, torch, "cuda" if gpus else "cpu")
    if rank == 0:
        for line in findings(everyone, summed, "nccl" if gpus else "gloo"):
            print(json.dumps(line), flush=True)
    dist.destroy_process_group()
    return 0


def _sum(dist: Any, torch: Any, device: str) -> str:
    """Sum a tensor over all ranks; the reason if it fails, or empty."""
    try:
        group = dist.new_group(backend="nccl", timeout=TIMEOUT) if device == "cuda" else None
        x = torch.ones(2**20, device=device)
        dist.all_reduce(x, group=group)
        return "" if bool((x == dist.get_world_size()).all()) else "the sum is wrong"
    except RuntimeError as error:
        return first_line(error)


def findings(everyone: Sequence[dict[str, Any]], summed: str, backend: str) -> list[list[str]]:
    """Put what all ranks saw into lines of the doctor: what was checked, and the remedy or an empty string."""
    nodes = sorted({each["node"] for each in everyone})
    what = f"{len(everyone)} ranks on {', '.join(nodes)}"
    lines = [[f"{what} sum a tensor over {backend}", summed and f"{summed}; NCCL_DEBUG=INFO says more"]]
    kinds = sorted({each["gpu"] for each in everyone if each["gpu"]})
    lines += [[f"GPU of a compute node: {kind}", ""] for kind in kinds]
    least = min(each["shared_gb"] for each in everyone)
    lines.append([f"compute nodes have {least:.2g} GB of /dev/shm or more", ""])
    problems = dict.fromkeys(problem for each in everyone for problem in each["problems"])
    lines += [["compute node", problem] for problem in problems]
    if kinds:
        for rank in slow_ones([each["speed"] for each in everyone]):
            where = f"rank {rank} on {everyone[rank]['node']}"
            lines.append(
                [
                    f"speed of {where}",
                    f"its GPU is slower than {100 * LEAST_SPEED:.0f} % of the median: take the node out",
                ]
            )
    return lines


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
