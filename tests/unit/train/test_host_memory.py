"""A training process keeps the memory that it frees, and objects from before the training are not searched for garbage."""

import ctypes
import gc
import platform
import subprocess
import sys
import weakref

import pytest

from pipeline.train.host_memory import keep_freed, old_objects_unsearched

PAGES_OF_STEPS = """
import resource, torch
from pipeline.train.host_memory import keep_freed
assert keep_freed()
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(5 * 2**18) for _ in range(20)]  # 5 MiB each
    del layers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[pages() for _ in range(5)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_later_steps_need_no_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", PAGES_OF_STEPS], capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    assert first >= 50  # 25,600 pages of 4 KiB, or 50 of 2 MiB
    assert min(later) < first / 10


class Recorded:
    """A C library whose mallopt notes its calls and refuses thresholds of more than 32 MiB, as glibc 2.34 does."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.calls.append((option, value))
        return int(value <= 2**25)


def test_old_glibc_gets_the_largest_threshold_that_it_takes_and_trimming_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Recorded()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.34"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed()
    assert library.calls == [(-3, 2**30), (-3, 2**25), (-1, -1)]


@pytest.mark.parametrize("own", [None, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_other_libraries_and_options_of_the_user_are_left_alone(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Recorded()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36") if own else ("", ""))
    if own:
        monkeypatch.setenv(own, "1")
    assert not keep_freed()
    assert library.calls == []


class Link:
    """An object that refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_new_garbage_is_collected_and_old_garbage_afterwards() -> None:
    before = gc.get_freeze_count()
    old = Link()
    kept = weakref.ref(old)
    with old_objects_unsearched():
        assert gc.get_freeze_count() > before + 1000
        del old
        new = weakref.ref(Link())
        gc.collect()
        assert new() is None
        assert kept() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert kept() is None
