"""The fingerprint batch: a few images, and what the model returned for them when it was exported.

Loading the export computes the outputs again. Equal outputs prove that code, kernels and weights still belong
together; hashes alone prove only the weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.exports.tensors import write_tensors
from pipeline.exports.weights import load_safetensors

TOLERANCE = 1e-3  # largest allowed error, relative to the largest output


@dataclass(frozen=True)
class Fingerprint:
    """Images (N, 3, H, W), normalised, and the model's outputs for them: logits, or a pretrainer's predicted pixels."""

    images: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, model: nn.Module, images: Tensor) -> Self:
        """Compute the outputs of `model`, which is in eval mode, in fp32."""
        images = images.float().contiguous()
        with torch.no_grad():
            return cls(images, model(images).contiguous())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file that `write` left."""
        tensors = load_safetensors(path)
        return cls(tensors["images"], tensors["outputs"])

    def write(self, path: Path) -> None:
        """Write both tensors as safetensors."""
        write_tensors(path, {"images": self.images, "outputs": self.outputs})

    def error(self, outputs: Tensor) -> float:
        """Return the largest difference between `outputs` and the stored ones, over the largest stored output."""
        return float((outputs - self.outputs).abs().max() / self.outputs.abs().max().clamp(min=1e-12))
