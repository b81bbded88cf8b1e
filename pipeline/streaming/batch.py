"""The batch that a loader gives to a task."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one or more virtual readers, one virtual reader after the other.

    Shapes: B samples, a multiple of `virtual_readers`; H, W height and width of the view in pixels.

    Attributes:
        images: (B, 3, H, W) float32, normalised; the weak view if there is a strong one. Cached features are (B, F). Until
            `pipeline.streaming.transfer` has normalised them, images and strong are uint8 pixels.
        strong: (B, 3, H, W) float32, normalised strong view, or None.
        labels: (B,) int64 class; -1 is hidden or padding.
        indices: (B,) int64 sample index; -1 is padding.
        virtual_readers: How many virtual readers the samples come from, B / `virtual_readers` from each.
    """

    images: Tensor
    strong: Tensor | None = None
    labels: Tensor
    indices: Tensor
    virtual_readers: int

    def __len__(self) -> int:
        return len(self.labels)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return this batch with `function` applied to each of its tensors."""
        return replace(
            self,
            images=function(self.images),
            strong=None if self.strong is None else function(self.strong),
            labels=function(self.labels),
            indices=function(self.indices),
        )

    def chunks(self, n: int) -> "list[Batch]":
        """Cut the batch into `n` equal, consecutive micro-batches, for gradient accumulation.

        A micro-batch holds whole virtual readers if `n` divides their number. Otherwise it counts as one virtual reader.

        Raises:
            ConfigError: `n` does not divide the number of samples.
        """
        if len(self) % n:
            raise ConfigError(
                f"a batch of {len(self)} samples cannot be cut into {n} equal micro-batches; choose a divisor"
            )
        size = len(self) // n
        virtual_readers = self.virtual_readers // n if self.virtual_readers % n == 0 else 1
        slices = [slice(k * size, (k + 1) * size) for k in range(n)]
        return [
            Batch(
                images=self.images[own],
                strong=None if self.strong is None else self.strong[own],
                labels=self.labels[own],
                indices=self.indices[own],
                virtual_readers=virtual_readers,
            )
            for own in slices
        ]

    def partner(self) -> Tensor:
        """Return (B,) the index in the batch of each sample's partner for mixup.

        The consecutive samples of each virtual reader are reversed. Virtual readers do not depend on the world size, so
        the pairs do not either, and micro-batches of whole virtual readers keep them. The middle sample of an odd
        number is its own partner, and so is a single one: the stage refuses a config that would mix a single one.
        """
        return torch.arange(len(self), device=self.labels.device).view(self.virtual_readers, -1).flip(1).flatten()
