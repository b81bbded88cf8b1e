"""The kinds of input: for each, a sound one to begin with, how it is damaged, and the command that meets it.

A case is made by `make(rng, folder, have)`, which writes the input into the case's folder and returns the command. The
command runs in a forked child (`law.py`), whose current folder is the case's.
"""

from tests.fuzz.kinds.base import Case, Make, Material
from tests.fuzz.kinds.configs import config, environment
from tests.fuzz.kinds.datasets import image, manifest, split, tar
from tests.fuzz.kinds.disk import disk
from tests.fuzz.kinds.exports import card, weights
from tests.fuzz.kinds.runs import books, checkpoint
from tests.fuzz.kinds.sources import served, source
from tests.fuzz.kinds.training import training

__all__ = ["KINDS", "NEED_RUNS", "SHARES", "Case", "Make", "Material"]

KINDS: dict[str, Make] = {
    "config": config,
    "card": card,
    "weights": weights,
    "environment": environment,
    "manifest": manifest,
    "split": split,
    "tar": tar,
    "image": image,
    "source": source,
    "served": served,
    "disk": disk,
    "books": books,
    "checkpoint": checkpoint,
    "training": training,
}
NEED_RUNS = {"books", "checkpoint", "training"}  # kinds that begin with finished runs
# How many of every 48 cases are of a kind that takes seconds; the other kinds share the rest.
SHARES = {"served": 1, "disk": 1, "books": 1, "checkpoint": 1, "training": 1}
