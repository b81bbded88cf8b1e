"""What the packed form of every family does: it needs the compiled layers, and refuses images that they cannot read.

Shapes: B images, C channels, K classes.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pipeline.errors import EnvironmentProblem
from pipeline.ops.native.build import BuildError
from pipeline.ops.native.vision_library import vision_library


class PackedModel(nn.Module, ABC):
    """A classifier on our compiled layers, for fp32 images on the CPU. A subclass computes the logits in `classify`.

    Args:
        in_chans: C.
        num_classes: K.
        image_size: H and W that the model was built for.
        any_size: Whether images may be larger or smaller.
        instead: What needs no compiler, for the refusal.

    Raises:
        EnvironmentProblem: There is no C++ compiler.
    """

    def __init__(
        self, *, in_chans: int, num_classes: int, image_size: tuple[int, int], any_size: bool, instead: str
    ) -> None:
        super().__init__()
        try:
            vision_library()
        except BuildError as error:
            raise EnvironmentProblem(f"pack() needs compiled layers: {error}; {instead} needs none") from error
        self.in_chans, self.num_classes = in_chans, num_classes
        self.image_size, self.any_size = image_size, any_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Classify images (B, C, H, W) in fp32 on the CPU: logits (B, K).

        Raises:
            ValueError: The images are of another type, device or shape.
        """
        if images.dtype != torch.float32 or images.device.type != "cpu":
            raise ValueError(f"a packed model takes fp32 on the CPU, not {images.dtype} on {images.device}")
        fits = images.dim() == 4 and images.shape[1] == self.in_chans and 0 not in images.shape[2:]
        if not fits or not (self.any_size or images.shape[2:] == torch.Size(self.image_size)):
            height, width = ("H", "W") if self.any_size else self.image_size
            raise ValueError(
                f"this packed model takes images (B, {self.in_chans}, {height}, {width}), not {tuple(images.shape)}"
            )
        return self.classify(images) if len(images) else images.new_empty(0, self.num_classes)

    @abstractmethod
    def classify(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of at least one image of a shape that the model takes."""
