"""How far chance moves an accuracy (torch-free)."""

import math


def standard_error(percent: float, images: int) -> float:
    """Return the standard error of an accuracy on some images, in percent; never 0 (Agresti and Coull's added counts)."""
    share = (percent / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(share * (1 - share) / images)
