"""The table that ends every conversion: what was found, what was written, and what was left out."""

from collections.abc import Mapping, Sequence


def table(num_images: int, left_out: Mapping[str, Sequence[str]], problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines of the table.

    Args:
        num_images: How many images, or rows of images, were found.
        left_out: Names of what is no image of the dataset, by the reason.
        problems: Names of images that were left out, by the reason.
    """
    reasons = {**left_out, **problems}
    found = num_images + sum(map(len, left_out.values()))
    written = num_images - sum(map(len, problems.values()))
    lines = [f"{'found':<12}{found:>10,}", f"{'written':<12}{written:>10,}", f"{'left out':<12}{found - written:>10,}"]
    for reason, names in sorted(reasons.items()):
        examples = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        lines.append(f"{'':<12}{len(names):>10,}  {reason}: {examples}")
    return lines
