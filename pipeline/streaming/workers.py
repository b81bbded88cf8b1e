"""Processes that make parts: how they start, how they end, and what is said when one dies."""

import atexit
import signal
import threading
import weakref
from collections.abc import Generator, Iterable
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from pipeline.errors import EnvironmentProblem
from pipeline.streaming.batches import Part, Parts

_running: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators of DataLoaders


def make_parts(source: Parts, numbers: Iterable[int], workers: int, prefetch: int) -> Generator[Part, None, None]:
    """source[k] for each number, in order, by `workers` processes (0: here). Close it to end them.

    Raises what a part failed with, and EnvironmentProblem if a process died.
    """
    parts = _start_workers(source, numbers, workers, prefetch) if workers else map(source.__getitem__, numbers)
    try:
        for part in parts:
            if part.failure:
                raise part.failure
            yield part
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise EnvironmentProblem(_death(error)) from None
    finally:
        if workers:
            _end_workers(parts)


def _start_workers(source: Parts, numbers: Iterable[int], workers: int, prefetch: int) -> Any:
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_signals,
    )
    parts = iter(loader)
    _name_dead_workers()
    if not _running:
        atexit.unregister(_end_all)
        atexit.register(_end_all)
    _running.add(parts)
    return parts


def _unchanged(part: Any) -> Any:
    return part


def _ignore_signals(worker: int) -> None:
    """Schedulers signal every process of a job; who reacts is the training process, which then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end_workers(parts: Any) -> None:
    """Ask, wait five seconds, kill: nothing less ends a process that ignores signals and is stuck in a read."""
    _running.discard(parts)
    parts._shutdown_workers()
    for worker in parts._workers:
        if worker.is_alive():
            worker.kill()


def _end_all() -> None:
    """At exit, before multiprocessing would send SIGTERM and wait for ever."""
    for parts in list(_running):
        _end_workers(parts)


def _name_dead_workers() -> None:
    """A killed worker may have cut its last message short, so torch does not wait for it: its SIGCHLD handler raises
    in whatever line is running. The same exception, but as a sentence with an exit code.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(handler) or getattr(handler, "names_dead_workers", False):
        return

    def raise_sentence(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            raise EnvironmentProblem(_death(error)) from None

    raise_sentence.names_dead_workers = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, raise_sentence)


def _death(error: RuntimeError) -> str:
    reason = str(error).splitlines()[0]
    return f"a data worker died ({reason}); most often memory or /dev/shm is full: lower workers or prefetch"
