"""Lets torchvision, and so timm, be imported beside a CPU build of torch."""

import torch

_DETECTION_OPS = ("nms", "qnms")
_library: list[torch.library.Library] = []  # a Library takes its definitions with it when it is collected


def allow_torchvision() -> None:
    """Call before the first `import torchvision` or `import timm`; later calls do nothing.

    torchvision's wheel links CUDA: on a CPU torch its compiled ops are skipped, but two of them get a fake
    implementation all the same, and that fails without their schemas. `ops.nms` itself stays unusable.
    """
    if _library or torch.version.cuda is not None or torch.version.hip is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for op in _DETECTION_OPS:
        library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.append(library)
