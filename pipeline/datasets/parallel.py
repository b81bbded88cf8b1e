"""Long work: one function over many jobs in several processes, which die with this one; and its progress bar."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.errors import EnvironmentProblem

T = TypeVar("T")
R = TypeVar("R")

BAR_AFTER_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
# What the running pool computes and for which items; forked workers have it without a copy.
_work: tuple[Callable[[Any], Any], Sequence[Any]]


def run_parallel(
    work: Callable[[T], R],
    jobs: Sequence[T],
    processes: int,
    unit: str,
    counts: Sequence[int] | None = None,
    held: Sequence[int] = (),
) -> Iterator[R]:
    """Yield `work(job)` for every job, in order; on a terminal, with a progress bar if it takes over two seconds.

    Args:
        work: The function. Workers are forked, so neither it nor the jobs are copied to them.
        jobs: Its arguments.
        processes: How many processes share the jobs; 1 = this process.
        unit: What the progress bar counts.
        counts: How many units each job has; None = one.
        held: File descriptors that workers close, such as that of a lock, which ends with this process.

    Raises:
        EnvironmentProblem: A worker was killed.
    """
    with _bar(unit, len(jobs) if counts is None else sum(counts)) as bar:
        for number, result in enumerate(_results(work, jobs, processes, held)):
            bar.update(1 if counts is None else counts[number])
            yield result


def counted(items: Iterable[T], unit: str, total: int | None = None) -> Iterator[T]:
    """Yield items in this process; on a terminal, with a progress bar if it takes over two seconds.

    Args:
        items: What is worked on.
        unit: What the bar counts.
        total: How many there are, for the time left; None = unknown.
    """
    with _bar(unit, total) as bar:
        for item in items:
            yield item
            bar.update()


def _bar(unit: str, total: int | None) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of tqdm's own: the next pool forks this process
    return tqdm(total=total, unit=f" {unit}", delay=BAR_AFTER_SECONDS, disable=not sys.stderr.isatty())


def _results(work: Callable[[T], R], jobs: Sequence[T], processes: int, held: Sequence[int]) -> Iterator[R]:
    global _work
    if processes <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    _work = work, jobs
    # Fork shares the large arrays that a job may hold; no process here has threads.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _start_worker, (os.getpid(), tuple(held))) as pool:
        try:
            yield from pool.map(_run_job, range(len(jobs)))
        except BrokenProcessPool:
            raise EnvironmentProblem(
                "a worker process was killed, perhaps because memory ran out; start again with fewer --processes"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker(parent: int, held: tuple[int, ...]) -> None:
    """Make a worker die with its parent, hold no lock of it, and leave Ctrl-C to it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for descriptor in held:
        os.close(descriptor)


def _run_job(number: int) -> Any:
    work, jobs = _work
    return work(jobs[number])
