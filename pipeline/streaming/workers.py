"""Worker processes that make batches: how they start and end, and the error when one dies."""

import atexit
import signal
import threading
import weakref
from collections.abc import Generator, Iterable
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from pipeline.errors import EnvironmentProblem, first_line
from pipeline.streaming.batches import Batches, RawBatch

GRACE = 0.5  # seconds in which a worker whose connection is gone shows that it has ended
_running: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators of DataLoaders


def read_batches(
    source: Batches, numbers: Iterable[int], workers: int, prefetch: int
) -> Generator[RawBatch, None, None]:
    """Yield `source[k]` for each k of `numbers`, in order; closing the generator ends the workers.

    Args:
        source: The batches by number.
        numbers: Which batches to make.
        workers: Processes that make them; 0 = this process.
        prefetch: Batches that each worker makes ahead.

    Raises:
        PipelineError: Making a batch failed with it.
        EnvironmentProblem: A worker process died.
    """
    batches = _start_workers(source, numbers, workers, prefetch) if workers else map(source.__getitem__, numbers)
    try:
        for batch in batches:
            if batch.failure:
                raise batch.failure
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise EnvironmentProblem(_death(first_line(error))) from None
    except (OSError, EOFError):
        # A worker that is killed while it hands over a batch closes the connection before torch hears of its death.
        dead = _dead_worker(batches) if workers else None
        if dead is None:
            raise
        raise EnvironmentProblem(_death(dead)) from None
    finally:
        if workers:
            _end_workers(batches)


def _start_workers(source: Batches, numbers: Iterable[int], workers: int, prefetch: int) -> Any:
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_signals,
    )
    batches = iter(loader)
    _name_dead_workers()
    if not _running:
        atexit.unregister(_end_all)
        atexit.register(_end_all)
    _running.add(batches)
    return batches


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Leave signals to the training process: schedulers signal every process of a job, and it ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _end_workers(batches: Any) -> None:
    """Ask the workers to end, then kill those that are left: one may ignore signals and be stuck in a read."""
    _running.discard(batches)
    batches._shutdown_workers()
    for worker in batches._workers:
        if worker.is_alive():
            worker.kill()


def _dead_worker(batches: Any) -> str | None:
    """Say which worker has ended, in torch's words; None if all are alive. One that was just killed is waited for."""
    for worker in batches._workers:
        worker.join(GRACE)
        if worker.exitcode is not None:
            return f"DataLoader worker (pid {worker.pid}) ended with exit code {worker.exitcode}"
    return None


def _end_all() -> None:
    """End all workers at exit, before multiprocessing sends SIGTERM, which they ignore, and waits for ever."""
    for batches in list(_running):
        _end_workers(batches)


def _name_dead_workers() -> None:
    """Turn the exception of torch's SIGCHLD handler into one of ours, with a sentence and an exit code.

    A killed worker may have cut its last message short, so torch does not wait for the message. Its SIGCHLD handler
    raises RuntimeError in whatever line is running.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(handler) or getattr(handler, "names_dead_workers", False):
        return

    def raise_sentence(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except RuntimeError as error:
            raise EnvironmentProblem(_death(first_line(error))) from None

    raise_sentence.names_dead_workers = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, raise_sentence)


def _death(words: str) -> str:
    return (
        f"a data worker died ({words}); most often memory or /dev/shm is full: lower data.loader.workers or"
        " data.loader.prefetch"
    )
