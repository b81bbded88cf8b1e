"""What a loader hands to a task."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples lane by lane. Shapes: B samples, a multiple of `virtual_readers`; H, W height and width of the view."""

    images: Tensor  # (B, 3, H, W) float32, normalised; the weak view if there is a strong one
    strong: Tensor | None = None  # (B, 3, H, W) float32, normalised
    labels: Tensor  # (B,) int64; -1 is hidden or padding
    indices: Tensor  # (B,) int64 manifest sample_indices; -1 is padding
    virtual_readers: int

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            strong=None if self.strong is None else self.strong.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            indices=self.indices.to(device, non_blocking=non_blocking),
        )

    def chunks(self, n: int) -> "list[Batch]":
        """`n` equal consecutive parts, for gradient accumulation: whole virtual_readers where `n` divides the virtual_readers."""
        if len(self) % n:
            raise ConfigError(f"a batch of {len(self)} samples cannot be cut into {n} equal parts; choose a divisor")
        size = len(self) // n
        virtual_readers = self.virtual_readers // n if self.virtual_readers % n == 0 else 1
        parts = [slice(k * size, (k + 1) * size) for k in range(n)]
        return [
            Batch(
                images=self.images[part],
                strong=None if self.strong is None else self.strong[part],
                labels=self.labels[part],
                indices=self.indices[part],
                virtual_readers=virtual_readers,
            )
            for part in parts
        ]

    def partner(self) -> Tensor:
        """(B,) places of the partners for mixup: the B / virtual_readers consecutive samples of each virtual reader are reversed.

        Virtual readers do not depend on the world size, so the pairs do not either. `chunks` of whole virtual readers keep
        the pairs; a chunk that cuts a virtual reader is one reader of its own. The middle sample of an odd number is its own
        partner, and so is a single one: configs that mix are then refused (`StageConfig._pairs`).
        """
        return torch.arange(len(self), device=self.labels.device).view(self.virtual_readers, -1).flip(1).flatten()
