"""What a loader hands to a task."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples lane by lane. Shapes: B samples, a multiple of `lanes`; H, W height and width of the view."""

    images: Tensor  # (B, 3, H, W) float32, normalised; the weak view if there is a strong one
    strong: Tensor | None = None  # (B, 3, H, W) float32, normalised
    labels: Tensor  # (B,) int64; -1 is hidden or padding
    indices: Tensor  # (B,) int64 manifest positions; -1 is padding
    lanes: int

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
        """`n` equal consecutive parts, for gradient accumulation: whole lanes where `n` divides the lanes."""
        if len(self) % n:
            raise ConfigError(f"a batch of {len(self)} samples cannot be cut into {n} equal parts; choose a divisor")
        size = len(self) // n
        lanes = self.lanes // n if self.lanes % n == 0 else 1
        parts = [slice(k * size, (k + 1) * size) for k in range(n)]
        return [
            Batch(
                images=self.images[part],
                strong=None if self.strong is None else self.strong[part],
                labels=self.labels[part],
                indices=self.indices[part],
                lanes=lanes,
            )
            for part in parts
        ]

    def partner(self) -> Tensor:
        """(B,) positions of the partners for mixup: each lane, of `B / lanes` consecutive samples, is flipped.

        Lanes do not know the world size, so neither do the pairs, nor are they changed by `chunks` that are whole lanes; a
        chunk that cuts lanes is one lane of its own. The middle one of an odd number is its own partner, and so is a lone
        one: configs that mix are refused then (`StageConfig.refuse_lone`).
        """
        return torch.arange(len(self), device=self.labels.device).view(self.lanes, -1).flip(1).flatten()
