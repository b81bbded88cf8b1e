"""From uint8 pixels in the host's memory to normalised images on the device that computes.

On a GPU the bytes travel from pinned memory on a stream of their own, one batch ahead of the batch that computes, and the GPU
normalises them: a quarter of the bytes of float32, and no copy that the host waits for. On a CPU nothing is copied, and the
images are normalised into reused memory.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.ops.arithmetic import image_layout
from pipeline.streaming.batch import Batch
from pipeline.streaming.buffers import Buffers
from pipeline.streaming.transforms import View, normalise


class _Sent(NamedTuple):
    """A batch on its way; `arrived` is None where nothing has to be waited for."""

    batch: Batch
    arrived: torch.cuda.Event | None


class Transfer:
    """Delivers batches of pixels as normalised batches on a device.

    Args:
        device: Where the batches are needed.
        views: Says how pixels are normalised.
        ahead: Batches that travel while the one before them computes; None = 1 on a GPU, 0 elsewhere.
    """

    def __init__(self, device: torch.device, views: View, ahead: int | None = None) -> None:
        self.device = device
        self.ahead = int(device.type == "cuda") if ahead is None else ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._constants = [constant.to(device) for constant in views.constants()]
        self._buffers = Buffers()

    def deliver(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield each batch on the device, in order, its uint8 images normalised; cached features stay as they are."""
        sent: deque[_Sent] = deque()
        for batch in batches:
            sent.append(self._send(batch))
            if len(sent) > self.ahead:
                yield self._receive(sent.popleft())
        while sent:
            yield self._receive(sent.popleft())

    def _send(self, batch: Batch) -> _Sent:
        if self._stream is None:
            return _Sent(batch.map(lambda tensor: tensor.to(self.device)), None)
        with torch.cuda.stream(self._stream):
            moved = batch.map(lambda tensor: _pinned(tensor).to(self.device, non_blocking=True))
            arrived = torch.cuda.Event()
            arrived.record()
        return _Sent(moved, arrived)

    def _receive(self, sent: _Sent) -> Batch:
        if sent.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(sent.arrived)
        return sent.batch.map(self._normalised)

    def _normalised(self, tensor: Tensor) -> Tensor:
        if self._stream is not None:  # its memory goes back to the other stream only when this one has read it
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return normalise(tensor, self._constants, self._room(tensor.shape)) if tensor.dtype == torch.uint8 else tensor

    def _room(self, shape: torch.Size) -> Tensor:
        if self.device.type == "cpu":
            return self._buffers.take(shape)
        return torch.empty(shape, device=self.device, memory_format=image_layout(self.device))


def _pinned(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory.

    Its memory comes from torch's cache of pinned blocks. A block is lent again only after an event that torch records behind
    the last copy from it, so a copy under way is not overwritten.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
