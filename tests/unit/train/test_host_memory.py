"""A training process keeps the memory that it frees, and objects from before the training are not searched for garbage."""

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from pipeline.train.host_memory import keep_freed, without_old_objects

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
    first, *_, last = map(int, done.stdout.split())
    assert first >= 50  # 25,600 pages of 4 KiB, or 50 of 2 MiB
    assert last < first / 10


def test_without_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed()


class Link:
    """An object that refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_new_garbage_is_collected_and_old_garbage_afterwards() -> None:
    old = Link()
    kept = weakref.ref(old)
    with without_old_objects():
        assert gc.get_freeze_count() > 1000
        del old
        new = weakref.ref(Link())
        gc.collect()
        assert new() is None
        assert kept() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert kept() is None
