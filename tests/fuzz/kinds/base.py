"""What a case is, and the sound inputs that cases are made of."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.fuzz import mutate

ROOT = Path(__file__).resolve().parents[3]


class Case(NamedTuple):
    """A command: a module's `main`, its arguments, and variables of the environment.

    Attributes:
        module: Name of the module.
        arguments: Words of its command line.
        environment: Variables that are set; an empty HOME is unset.
        trains: Whether a stage that accepts its inputs is really trained.
        largest: Bytes that a file may have; beyond them a write fails, as on a full disk.
    """

    module: str
    arguments: list[str]
    environment: Mapping[str, str] = MappingProxyType({})
    trains: bool = False
    largest: int = 2**28


class Material(NamedTuple):
    """What sound inputs are made of.

    Attributes:
        digits: The digits as shards, with their split.
        small: A dataset of 96 tiny images in 4 classes, as shards, with its split.
        runs: Finished runs of all stages on `small`; each keeps all its checkpoints.
        export: An export of a tiny classifier.
        weights: A torch checkpoint of a tiny Vim in its released layout.
        server: Address of a web server that serves `small` in hostile ways.
    """

    digits: Path
    small: Path
    runs: Path
    export: Path
    weights: Path
    server: str


def damaged(rng: random.Random, path: Path) -> bytes:
    """Return the content of a file with its JSON values or its bytes changed."""
    whole = path.read_bytes()
    try:
        values = json.loads(whole)
    except ValueError:
        return mutate.data(rng, whole)
    if rng.random() < 0.3:
        return mutate.data(rng, whole)
    return encoded(mutate.tree(rng, values, rng.randrange(1, 3)))


def encoded(values: Any) -> bytes:
    """Return values as JSON; those that nest too deeply to be written become a text that nests as deeply."""
    try:
        return json.dumps(values).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 10_000


Make = Callable[[random.Random, Path, Material], Case]
