"""What a frozen teacher sees: the student's images, normalised and sized as the teacher was trained on them."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.exports.card import Preprocessing


class TeacherInput(nn.Module):
    """A teacher behind images that were prepared for a student.

    The student's normalisation is undone and the teacher's is done, in one step. Images of another size are resized,
    bicubic and antialiased as an evaluation view is. The ground behind transparent pixels stays the student's.

    Args:
        network: Maps images (B, 3, *image_size) to logits (B, K).
        student: How the images were prepared.
        own: How the teacher's images were prepared.
        image_size: (height, width) of the teacher's images, in pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, student: Preprocessing, own: Preprocessing, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.network, self.image_size = network, image_size
        channels = list(zip(student.mean, student.std, own.mean, own.std, strict=True))
        scale = [std / own_std for _, std, _, own_std in channels]
        shift = [(mean - own_mean) / own_std for mean, _, own_mean, own_std in channels]
        self.register_buffer("scale", torch.tensor(scale)[:, None, None], persistent=False)
        self.register_buffer("shift", torch.tensor(shift)[:, None, None], persistent=False)
        self.same = (student.mean, student.std) == (own.mean, own.std)

    def forward(self, images: Tensor) -> Tensor:
        """Map the student's images (B, 3, H, W) to the teacher's logits (B, K)."""
        if not self.same:
            images = images * self.scale + self.shift
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True, align_corners=False)
        return self.network(images)

    def digest(self, student: Preprocessing) -> str:
        """Return 8 hex digits that differ when the teacher sees equal images differently.

        Args:
            student: How the images were prepared.
        """
        what = (student.mean, student.std, self.scale.tolist(), self.shift.tolist(), self.image_size)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:8]
