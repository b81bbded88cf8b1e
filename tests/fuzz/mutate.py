"""Structure-aware mutations: of bytes, of nested values, and of single values."""

import copy
import random
import string
from typing import Any

HUGE = (0, -1, 1, 2, 255, 2**31, 2**63, 2**64, 10**8, 10**18, 10**30, -(10**18))
NUMBERS = (0.0, -1.0, 1e-300, 1e300, 0.5, 1.5, 1e8)
WORDS = (
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "\x00",
    "a\x00b",
    "\ud800",
    "y" * 300,
    "z" * 5000,
    "é",
    "\n",
)
WORDS += ("null", "0x_", "2024-01-01", "timm/hf-hub:a/b", "timm/resnet10t", "vim_nano", "$(touch x)", "%s%n", "{0}")


def value(rng: random.Random) -> Any:
    """One value of a kind that nobody expects."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(HUGE)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.choice((None, True, False, [], {}))
    if kind == 4:
        return [value(rng) for _ in range(rng.randrange(5))]
    if kind == 5:
        return {rng.choice(WORDS): value(rng) for _ in range(rng.randrange(4))}
    if kind == 6:
        return "".join(rng.choices(string.printable, k=rng.randrange(40)))
    if kind == 7:
        return rng.randrange(-5, 300)
    nested: Any = 1
    for _ in range(rng.choice((5, 50, 200))):
        nested = [nested]
    return nested


def tree(rng: random.Random, root: Any, number: int = 1) -> Any:
    """Return nested values with some of their leaves or branches replaced, dropped, doubled or exchanged."""
    root = copy.deepcopy(root)
    for _ in range(number):
        places = list(_places(root))
        if not places:
            return value(rng)
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind <= 2:
            parent[key] = value(rng)
        elif kind == 3 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * rng.choice((0, -1, 2, 10, 10**6)) + rng.choice((0, 1, -1))
        elif kind == 4:
            del parent[key]
        else:
            other, name = rng.choice(places)
            if isinstance(other, dict) or name < len(other):
                parent[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name])
        if isinstance(parent, dict) and rng.random() < 0.1:
            parent[rng.choice(WORDS)] = value(rng)
    return root


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(items):
        yield node, key
        yield from _places(child)


def data(rng: random.Random, whole: bytes, number: int = 3) -> bytes:
    """Return bytes with some flipped, cut, zeroed, doubled, inserted or replaced by extreme numbers."""
    found = bytearray(whole)
    for _ in range(rng.randrange(1, number + 1)):
        kind, size = rng.randrange(7), len(found)
        place = rng.randrange(size + 1) if rng.random() < 0.5 else rng.randrange(min(size, 200) + 1)
        length = rng.choice((1, 2, 4, 8, 16, 512))
        if kind == 0 and place < size:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[place:]
        elif kind == 2:
            found[place : place + length] = bytes(min(length, size - place))
        elif kind == 3:
            found[place:place] = found[place : place + length]
        elif kind == 4:
            found[place : place + length] = rng.randbytes(length)
        elif kind == 5:
            number_ = rng.choice((2**31 - 1, 2**32 - 1, 2**63 - 1, 2**62, 10**9, 0))
            found[place : place + 8] = number_.to_bytes(8, rng.choice(("little", "big")))
        else:
            del found[place : place + length]
    return bytes(found)
