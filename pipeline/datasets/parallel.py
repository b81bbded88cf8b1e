"""One function over many jobs in several processes."""

import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_parallel(work: Callable[[T], R], jobs: list[T], processes: int, unit: str) -> Iterable[R]:
    """Yield `work(job)` for every job, in order, with a progress bar on a terminal.

    Args:
        work: A function of a module, so that it can be sent to other processes.
        jobs: Its arguments.
        processes: How many processes share the jobs; 1 = this process.
        unit: What the progress bar counts.
    """
    from tqdm import tqdm

    silent = not sys.stderr.isatty()
    if processes <= 1 or len(jobs) == 1:
        yield from tqdm(map(work, jobs), total=len(jobs), unit=unit, disable=silent)
        return
    # Fork shares the large arrays that a job may hold; no process here has threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        try:
            yield from tqdm(pool.map(work, jobs), total=len(jobs), unit=unit, disable=silent)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
