"""Where the ranks meet: from the environment to a store that listens on no more addresses than the ranks need.

torch's own store listens on every interface of the machine and takes in everyone who connects. So rank 0 binds the socket
itself: one process needs no socket at all, processes of one machine meet on its loopback, and those of several at the
address that all of them use. gloo and NCCL open sockets of their own, on the network device of that address.

torch is imported late: a contradiction is told before that.
"""

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from pipeline.errors import EnvironmentProblem

if TYPE_CHECKING:
    from torch.distributed import Store

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
_MAX_RANKS = 1_000_000


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this process.

    Raises:
        EnvironmentProblem: If the variables contradict one another.
    """
    given = {name: environment[name] for name in NAMES if name in environment}
    # The srun step's number of tasks, not that of the allocation around a shell.
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1, _MAX_RANKS) if "SLURM_STEP_NUM_TASKS" in environment else 1
    if len(given) == len(NAMES):
        size = _number(given, "WORLD_SIZE", 1, _MAX_RANKS)
        if tasks > 1 and size % tasks:
            raise EnvironmentProblem(
                f"srun started {tasks} tasks but WORLD_SIZE is {given['WORLD_SIZE']}: every task would train alone or wait for"
                " ever; unset RANK and WORLD_SIZE, or start one task per node with torchrun inside"
            )
        place = environment.get("SLURM_PROCID", given["RANK"])
        # torchrun numbers its processes in the order in which they arrive, not by srun's numbers.
        if tasks == size > 1 and place != given["RANK"] and "TORCHELASTIC_RUN_ID" not in environment:
            raise EnvironmentProblem(
                f"RANK is {given['RANK']} in srun's task {place} of {tasks}: all tasks would take the same rank; unset RANK"
            )
        _number(given, "RANK", 0, size - 1)
        _number(given, "LOCAL_RANK", 0, size - 1)
        _number(given, "MASTER_PORT", 0 if size == 1 else 1, 65535)
        return given
    if given and tasks == 1:
        missing = [name for name in NAMES if name not in given]
        raise EnvironmentProblem(
            f"the environment gives {', '.join(given)} but not {', '.join(missing)};"
            " start with `python -m launchers local` or torchrun, or unset them for one process"
        )
    if tasks > 1:
        absent = [name for name in _SLURM if name not in environment]
        if absent:
            raise EnvironmentProblem(
                f"srun started {tasks} tasks but {', '.join(absent)} is not set; start with srun or torchrun"
            )
        size = _number(environment, "SLURM_NTASKS", 1, _MAX_RANKS)
        return {
            "RANK": str(_number(environment, "SLURM_PROCID", 0, size - 1)),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID", 0, size - 1)),
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(_port(environment)),
        }
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any free one
    }


def _port(environment: Mapping[str, str]) -> int:
    """A port that is equal on all nodes and differs between the starts of a requeued job, so that their ranks never meet.

    It lies below the range from which Linux hands out ports.
    """
    job = _number(environment, "SLURM_JOB_ID", 0, 2**63)
    restarts = _number({"SLURM_RESTART_COUNT": "0", **environment}, "SLURM_RESTART_COUNT", 0, 2**31)
    return 20_000 + (job * 37 + restarts) % 12_000


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    """Return a variable as a number, or say in a sentence what is wrong with it."""
    text = environment[name]
    if re.fullmatch(r"[0-9]{1,19}", text) and least <= int(text) <= most:
        return int(text)
    allowed = f"a number from {least} to {most}" if most < _MAX_RANKS else f"a number of at least {least}"
    raise EnvironmentProblem(
        f"{name} is {text[:60]!r}, but it must be {allowed}; start with `python -m launchers local`, torchrun or srun, or"
        f" unset {', '.join(NAMES)} for one process"
    )


def first_host(nodes: str) -> str:
    """Return the first name of SLURM's node list: `gpu[003-007,9],cpu1` -> `gpu003`."""
    match = re.match(r"([A-Za-z0-9_.-]+)(?:\[([0-9]+))?", nodes)
    if match is None:
        raise EnvironmentProblem(
            f"{nodes[:60]!r} is not a node list of SLURM; expected one such as gpu[003-007,9],cpu1"
        )
    return match.group(1) + (match.group(2) or "")


def keep_to_the_ranks(found: Mapping[str, str], public_address: bool) -> None:
    """Make gloo and NCCL listen on the network device that leads to the other ranks, unless the environment names one.

    Args:
        found: What `rendezvous` returns.
        public_address: Whether the address may belong to the internet.

    Raises:
        EnvironmentProblem: MASTER_ADDR has no address, or a public one that is not allowed.
    """
    address = _address(found)
    if address.is_global and not public_address and found["WORLD_SIZE"] != "1":
        raise EnvironmentProblem(
            f"MASTER_ADDR {found['MASTER_ADDR']} is {address}, an address of the internet, and the ranks talk without a"
            " password or encryption; give an address of a private network, or set engine.public_address=true if a firewall"
            " keeps others away"
        )
    if device := _device(address, int(found["MASTER_PORT"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", device)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={device}")


def open_store(found: Mapping[str, str], timeout: timedelta) -> "Store | None":
    """Open the store at which the ranks meet.

    Args:
        found: What `rendezvous` returns.
        timeout: How long a rank waits for the others.

    Returns:
        The store; None if torchrun's agent has opened one.

    Raises:
        EnvironmentProblem: The port is taken, or the address belongs to another machine than rank 0's.
    """
    import torch.distributed as dist

    size, port = int(found["WORLD_SIZE"]), int(found["MASTER_PORT"])
    if size == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address = _address(found)
    if found["RANK"] != "0":
        return dist.TCPStore(str(address), port, size, is_master=False, timeout=timeout)
    listener = _bound(found["MASTER_ADDR"], address, port)
    # The store takes over the descriptor and closes it.
    return dist.TCPStore(str(address), port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def _bound(name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> socket.socket:
    """Return a listening socket at one address."""
    listener = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} of {name} is taken by another process; set MASTER_PORT to a free one"
        elif error.errno == errno.EADDRNOTAVAIL:
            reason = (
                f"MASTER_ADDR {name} ({address}) belongs to another machine than rank 0; give one of rank 0's machine"
            )
        else:
            reason = f"rank 0 cannot listen at {name}, port {port}: {error.strerror}; set MASTER_PORT to another one"
        raise EnvironmentProblem(reason) from None
    return listener


def _address(found: Mapping[str, str]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Look up MASTER_ADDR; all ranks of a machine find the same first address."""
    name = found["MASTER_ADDR"]
    try:
        listed = socket.getaddrinfo(name, int(found["MASTER_PORT"]), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no name of a machine"
        raise EnvironmentProblem(
            f"MASTER_ADDR {name[:100]!r} has no address ({reason}); give the name or the address of rank 0's machine"
        ) from None
    listed.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return ipaddress.ip_address(str(listed[0][4][0]).partition("%")[0])


def _device(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> str | None:
    """Return the network device of this machine that leads to an address; None if it is not found."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as unsent:  # nothing is sent
            unsent.connect((str(address), port or 9))
            own = unsent.getsockname()[0]
    except OSError:
        return None
    devices = {
        entry.address.partition("%")[0]: name for name, entries in psutil.net_if_addrs().items() for entry in entries
    }
    loopback = next((name for a, name in devices.items() if a in ("127.0.0.1", "::1")), None)
    return loopback if ipaddress.ip_address(own).is_loopback else devices.get(own)
