"""python -m tests.integration.listening SECONDS COMMAND...: what a command and its children listen on, one JSON line.

Every tenth of a second it notes the address of every listening TCP socket of the process and its descendants.
"""

import json
import subprocess
import sys
import time

import psutil


def watch(command: list[str], seconds: float, **more: object) -> tuple[int, str, set[str]]:
    """Run a command; its exit code, what it said, and the addresses that it listened on."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)  # type: ignore[call-overload]
    found: set[str] = set()
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        family = [psutil.Process(process.pid), *children(process.pid)]
        for member in family:
            found |= addresses(member)
        time.sleep(0.05)
    process.kill()
    return process.wait(), process.communicate()[0], found


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def addresses(process: psutil.Process) -> set[str]:
    try:
        return {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    except psutil.Error:
        return set()


if __name__ == "__main__":
    code, said, found = watch(sys.argv[2:], float(sys.argv[1]))
    print(json.dumps({"code": code, "listens": sorted(found), "said": said[-600:]}))
