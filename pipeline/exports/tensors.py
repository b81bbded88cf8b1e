"""Write safetensors files so that a disk that refuses raises OSError, as every other write does."""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file.

    Args:
        path: The file; it is not written whole or not at all, so give a temporary one.
        tensors: Contiguous tensors by name.

    Raises:
        OSError: The disk refuses. safetensors raises a class of its own, which names the number of the error only.
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), re.sub(r".*I/O error: | \(os error.*", "", str(error)), str(path)) from None
