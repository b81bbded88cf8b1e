"""What forbids waiting for a GPU in a test."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forbidden() -> Iterator[None]:
    """Let each call that waits for the GPU raise RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the check is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
