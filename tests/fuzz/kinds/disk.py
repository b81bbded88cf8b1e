"""Sound inputs on a disk that is full at some moment."""

import random
from pathlib import Path

from tests.fuzz.kinds.base import Case, Material
from tests.fuzz.kinds.runs import stage_command

_LEAST = 4096  # bytes; standard error is a file too


def disk(rng: random.Random, folder: Path, have: Material) -> Case:
    """A command with sound inputs, none of whose files may grow beyond a limit."""
    largest = rng.choice((_LEAST, 10_000, 50_000, 10**6))
    images = str(have.small.parent / "images" / "train")
    commands = (
        ("pipeline.data", ["convert", "imagefolder", images, "--out", "out", "--processes", "1"]),
        (
            "pipeline.data",
            ["split", f"{have.digits}/train", "--out", "split.json", "--labelled", "0.1", "--folds", "2"],
        ),
        ("pipeline.models.__main__", ["convert", str(have.weights), "--out", "out"]),
        ("pipeline.predict", [str(have.export), images, "--csv", "out.csv"]),
        ("stages.__main__", stage_command("arm", have)),
    )
    module, arguments = rng.choice(commands)
    return Case(module, arguments, trains=True, largest=largest)
