"""Find images that occur several times: the same bytes or pixels, and images that look alike."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.check.measure import HASH_SIDE
from pipeline.datasets.parallel import counted

MAX_BITS = 32  # bits of 256 that may differ between two images that look alike
MAX_INDEX_BITS = 4  # bits that may differ among the 64 lowest frequencies
MAX_COLOUR = 24  # levels of 255 in the mean of a channel; the hash sees no colour
_INDEX_SIDE = 8
_CHUNK = 1 << 20  # pairs that are compared at once
_MAX_FOUND = 2_000_000  # pairs
_MAX_GROUP = 512  # images with an equal band of which all pairs are compared
_NEIGHBOURS = 16  # an image of a larger group, such as frames of a film, is compared with so many, by hash and colour

Pairs = NDArray[np.int64]  # (num_pairs, 2)


def equal_groups(keys: NDArray[np.bytes_]) -> list[NDArray[np.int64]]:
    """Return the places of keys that occur more than once, one sorted array per key, in order of the first place."""
    order = np.argsort(keys, kind="stable")
    first = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
    sizes = np.diff(np.r_[first, len(keys)])
    groups = [order[start : start + size] for start, size in zip(first, sizes, strict=True) if size > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def similar_pairs(hashes: NDArray[np.uint8], colours: NDArray[np.uint8]) -> tuple[Pairs, bool]:
    """Return all pairs of images that differ in at most `MAX_INDEX_BITS` low frequencies, `MAX_BITS` and `MAX_COLOUR`.

    The 64 low frequencies are cut into five bands. Two hashes that differ in at most four bits agree in one band, so only
    hashes with an equal band are compared: about 6 million pairs of 100,000 photographs. Of more than `_MAX_GROUP` images
    with an equal band each is compared with `_NEIGHBOURS` others, so the time grows with the number of images, not its square.

    Args:
        hashes: (N, 32) hashes of `measure.perceptual_hash`.
        colours: (N, 3) mean of each channel.

    Returns:
        (num_pairs, 2) places, the smaller one first, in order; and whether these are all: not if a group was large, or
        more than 2 million pairs were found.
    """
    index = _index_bits(hashes)
    numbers = np.packbits(index, axis=1).view(np.uint64)[:, 0] if len(index) else np.empty(0, np.uint64)
    words, shades = np.ascontiguousarray(hashes).view(np.uint64), colours.astype(np.int16)
    found = [np.empty((0, 2), np.int64)]
    complete = True
    order = np.lexsort((*colours.T, numbers))  # places of images that are nearly equal follow one another
    bands = np.array_split(np.arange(_INDEX_SIDE**2), MAX_INDEX_BITS + 1)
    for band in counted(bands, "comparisons of all images", len(bands)):
        keys = index[order][:, band] @ (1 << np.arange(len(band)))
        partners, whole = _partners(keys)
        complete &= whole
        for pairs in _pairs_with_equal_key(keys, partners):
            pairs = order[pairs]
            left, right = pairs.T
            pairs = pairs[np.bitwise_count(numbers[left] ^ numbers[right]) <= MAX_INDEX_BITS]
            left, right = pairs.T
            pairs = pairs[np.bitwise_count(words[left] ^ words[right]).sum(axis=1) <= MAX_BITS]
            left, right = pairs.T
            found.append(pairs[np.abs(shades[left] - shades[right]).max(axis=1, initial=0) <= MAX_COLOUR])
            if sum(map(len, found)) > _MAX_FOUND:
                return _in_order(found), False
    return _in_order(found), complete


def _in_order(found: list[Pairs]) -> Pairs:
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def connected_groups(pairs: Pairs, count: int) -> list[NDArray[np.int64]]:
    """Return the sets of places that pairs connect, of two places or more, in order of the first place."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    inside = np.unique(pairs)
    return [inside[group] for group in equal_groups(component[inside])]


def _index_bits(hashes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    bits = np.unpackbits(hashes, axis=1).reshape(-1, HASH_SIDE, HASH_SIDE)
    return bits[:, :_INDEX_SIDE, :_INDEX_SIDE].reshape(-1, _INDEX_SIDE**2)


def _partners(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], bool]:
    """Return with how many images behind it in its group each is compared, in sorted order; and whether these are all."""
    ordered = np.sort(keys)
    ends = np.searchsorted(ordered, ordered, side="right")
    sizes = ends - np.searchsorted(ordered, ordered, side="left")
    behind = ends - np.arange(len(keys)) - 1
    large = sizes > _MAX_GROUP
    return np.where(large, np.minimum(behind, _NEIGHBOURS), behind), not large.any()


def _pairs_with_equal_key(keys: NDArray[np.int64], partners: NDArray[np.int64]) -> Iterator[Pairs]:
    """Yield pairs of places with equal keys, in chunks of bounded size; `partners` says how many of each."""
    order = np.argsort(keys, kind="stable")
    start = 0
    while start < len(keys):
        total = np.cumsum(partners[start : start + _CHUNK])
        stop = start + max(1, int(np.searchsorted(total, _CHUNK, side="right")))
        left = np.repeat(np.arange(start, stop), partners[start:stop])
        offset = np.arange(len(left)) - np.repeat(
            np.cumsum(partners[start:stop]) - partners[start:stop], partners[start:stop]
        )
        yield np.stack([order[left], order[left + 1 + offset]], axis=1)
        start = stop
