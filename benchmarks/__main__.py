"""All figures of the project: python -m benchmarks [NAME...] [--simd avx2] [--again] [--page].

It runs each benchmark as a person would, and adds the JSON object of its last line to docs/performance.jsonl, with the
command, the commit, the machine, the date, and the share of the processor that others used meanwhile. A benchmark that has a
record of this commit and machine is not run again, so the command continues where it stopped. Then it writes
docs/performance.md from all records; --page only does that.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks import machine, performance
from pipeline.cli import guarded
from pipeline.config import choose
from pipeline.errors import ConfigError

# What `make bench` runs. Rounds are few, so that all but `engine` take eleven minutes on two quiet cores.
COMMANDS: dict[str, list[str]] = {
    "inference": ["benchmarks.inference"],
    "resolution": [
        "benchmarks.inference",
        *performance.CURVES,
        "--sizes",
        *map(str, performance.SIZES),
        "--batch=1",
        "--deployed",
    ],
    "scan": ["benchmarks.scan"],
    "lyapema": ["benchmarks.lyapema"],
    "engine": ["benchmarks.engine", "--pairs=20", "--saves=2"],
    "data": ["benchmarks.data", "--rounds=3"],
    "several": ["benchmarks.several"],
    "small": ["benchmarks.small", "--rounds=20"],
}
LIMIT = 600  # seconds for one benchmark


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(COMMANDS)}")
    parser.add_argument("--simd", choices=sorted(machine.NARROWER), help="use a narrower instruction set")
    parser.add_argument("--again", action="store_true", help="take figures again that this commit already has")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args(words)
    for name in given.names:
        choose("benchmark", name, COMMANDS)
    os.environ.update(machine.NARROWER[given.simd] if given.simd else {})
    failed = [] if given.page else [name for name in given.names or COMMANDS if not _take(name, again=given.again)]
    print(performance.write_page())
    if failed:
        raise ConfigError(f"{', '.join(failed)}: no figures; type python -m {' '.join(COMMANDS[failed[0]])} to see why")
    return 0


def _take(name: str, *, again: bool) -> bool:
    """Run a benchmark and append its record; return whether there is one."""
    place = {"processor": machine.processor(), "instructions": machine.instructions()}
    known = {"name": name, "commit": _commit(), **place}
    if not again and any(known.items() <= record.items() for record in performance.records()):
        print(f"{name}: known", flush=True)
        return True
    command = ["-m", *COMMANDS[name]]
    print(f"{name}: python {' '.join(command)}", flush=True)
    watch, start = machine.Watch(), time.perf_counter()
    try:
        output = subprocess.run(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True
        )
        print(output.stdout, end="", flush=True)
        figures = json.loads(output.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"{name}: {str(error)[:200]}", file=sys.stderr, flush=True)
        return False
    record: dict[str, Any] = {
        **known,
        "command": f"python {' '.join(command)}",
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - start),
        "others": round(watch.others(), 3),
        "figures": figures,
    }
    with performance.RECORDS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return True


def _commit() -> str:
    """Return the commit of the code, with a mark if files differ from it."""

    def git(*words: str) -> str:
        try:
            command = ["git", "-C", str(performance.ROOT), *words]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            raise ConfigError("figures name their commit: call make bench in a clone of the repository") from None

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cpp", "*.h")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


if __name__ == "__main__":
    sys.exit(main())
