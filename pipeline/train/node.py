"""The node of a rank: how many ranks share it, and which of its CPUs belong to this one (torch-free).

A rank and its data workers run fastest on the CPU socket that its GPU hangs on: memory and transfers of another socket cross
a link between the two. srun's own binding goes by task numbers and knows no GPUs, so each rank binds itself, in the same way
under srun, torchrun and the local launcher. The workers inherit the binding.
"""

import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

SYSTEM = Path("/sys")
# torchrun and our own launcher set the first, DeepSpeed's launcher the second.
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def ranks_here(environment: Mapping[str, str]) -> int:
    """Return how many ranks run on this node, as far as the environment tells; 1 if it does not."""
    for name in LOCAL_SIZES:
        if re.fullmatch(r"[1-9][0-9]{0,5}", environment.get(name, "")):
            return int(environment[name])
    # srun's form: 8(x64) for 64 nodes of 8 tasks, 2,1 for two nodes of 2 and 1.
    counts: list[int] = []
    for tasks, times in re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(tasks)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    return max(1, counts[int(node)]) if node.isdecimal() and int(node) < len(counts) else 1


def cores_of_rank(environment: Mapping[str, str], allowed: int | None = None) -> int:
    """Return how many CPUs a rank has for itself and its data workers: at least 1.

    Args:
        environment: The environment variables.
        allowed: CPUs that this process may use; by default asked of the system. Ranks of one node share them, unless SLURM
            counts CPUs per task.
    """
    return max(1, _share(environment, len(_allowed()) if allowed is None else allowed))


def has_own_core(environment: Mapping[str, str]) -> bool:
    """Return whether there is a CPU for each rank of this node; ask before `bind`, after which others are not seen."""
    return _share(environment, len(_allowed())) >= 1


def _share(environment: Mapping[str, str], allowed: int) -> int:
    per_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if environment.get("SLURM_STEP_NUM_TASKS") == environment.get("WORLD_SIZE") and per_task.isdecimal():
        return min(int(per_task), allowed)
    return allowed // ranks_here(environment)


def bind(local_rank: int, ranks: int, gpu: str | None = None, system: Path = SYSTEM) -> None:
    """Keep this process to the CPUs of one socket, if it may use several and shares the node with other ranks.

    Args:
        local_rank: Number of this process on its node.
        ranks: Processes on this node.
        gpu: PCI address of its GPU, such as 0000:3b:00.0; None = the ranks are spread evenly over the sockets.
        system: Where the system describes itself.
    """
    chosen = cpus_of_socket(_allowed(), local_rank, ranks, gpu, system)
    if chosen and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, chosen)
        logger.info("rank 0 and its data workers run on %d CPUs of one socket", len(chosen))


def cpus_of_socket(allowed: Collection[int], local_rank: int, ranks: int, gpu: str | None, system: Path) -> set[int]:
    """Return the CPUs that `bind` chooses among the allowed ones; empty if there is nothing to choose."""
    sockets: dict[int, set[int]] = {}
    for cpu in sorted(allowed):
        try:
            socket = int((system / f"devices/system/cpu/cpu{cpu}/topology/physical_package_id").read_text())
        except (OSError, ValueError):
            return set()
        sockets.setdefault(socket, set()).add(cpu)
    if ranks == 1 or len(sockets) < 2:
        return set()
    groups = list(sockets.values())
    if gpu is not None:
        try:
            near = _cpu_list((system / f"bus/pci/devices/{gpu}/local_cpulist").read_text())
        except (OSError, ValueError):
            return set()
        found = [group for group in groups if group & near]
        return found[0] if len(found) == 1 else set()
    return groups[local_rank * len(groups) // ranks]


def _cpu_list(text: str) -> set[int]:
    """Read the system's list of CPUs, such as 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _allowed() -> set[int]:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
