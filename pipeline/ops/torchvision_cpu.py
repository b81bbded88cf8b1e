"""Make torchvision, and so timm, importable with a CPU build of torch."""

import torch

_DETECTION_OPS = ("nms", "qnms")
_library: list[torch.library.Library] = []  # the definitions vanish when their Library is collected


def allow_torchvision() -> None:
    """Make torchvision importable; call this before the first `import torchvision` or `import timm`.

    torchvision's wheel links CUDA. With a CPU build of torch its compiled ops are not loaded, but torchvision registers
    a fake implementation for two of them, which fails without their schemas. This function defines the schemas.
    `ops.nms` itself stays unusable. Later calls do nothing.
    """
    if _library or torch.version.cuda is not None or torch.version.hip is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for op in _DETECTION_OPS:
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.append(library)
