"""Measure every image of a dataset once: hashes of its bytes and pixels, a perceptual hash, its size, its range.

The perceptual hash is that of `imagehash.phash(image, hash_size=16)`, bit for bit: the signs of the 16 x 16 lowest
frequencies of the discrete cosine transform, against their median. It is written out here, because the library brings
PyWavelets (9 MB, compiled), which this hash does not use.
"""

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.manifest import Manifest, read_image
from pipeline.datasets.parallel import run_parallel
from pipeline.decoding import DEFAULT, Decoding
from pipeline.errors import DataError
from pipeline.images import Pixels, UnreadableImage, decode

HASH_SIDE = 16  # frequencies in each direction; the hash has HASH_SIDE**2 bits
_THUMBNAIL_SIDE = 64
_NUM_JOBS = 256  # each opens the manifest again, which takes a moment for a large one
CONSTANT_RANGE = 4  # levels of 255 between the darkest and the brightest pixel of an image of one colour
MEASURES = np.dtype(
    [
        ("bytes", "S16"),  # BLAKE2b of the stored bytes
        ("pixels", "S16"),  # BLAKE2b of the size and the decoded pixels; that of the bytes if they do not decode
        ("look", "u1", (HASH_SIDE**2 // 8,)),  # the perceptual hash
        ("width", "<u4"),  # 0 if the image does not decode
        ("height", "<u4"),
        ("range", "u1"),  # between the darkest and the brightest value of a channel, the largest of the channels
        ("colour", "u1", (3,)),  # the mean of each channel
    ]
)


def measure(manifest: Manifest, processes: int = 1, decoding: Decoding = DEFAULT) -> NDArray[np.void]:
    """Measure all images of a dataset.

    A process holds one image at a time; the result takes 76 bytes per image.

    Args:
        manifest: The dataset.
        processes: How many processes share the images.
        decoding: The limit on pixels.

    Returns:
        (num_samples,) of type `MEASURES`.

    Raises:
        DataError: The shards are remote, or a shard cannot be read.
    """
    if manifest.remote:
        raise DataError(f"the shards of {manifest} are behind an address; run check on the machine that holds them")
    step = max(16, -(-manifest.num_samples // _NUM_JOBS))
    jobs = [(manifest, start, start + step) for start in range(0, manifest.num_samples, step)]
    counts = [min(stop, manifest.num_samples) - start for _, start, stop in jobs]
    work = functools.partial(_measure_range, decoding)
    return np.concatenate(list(run_parallel(work, jobs, processes, "images", counts)))


def _measure_range(decoding: Decoding, job: tuple[Manifest, int, int]) -> NDArray[np.void]:
    manifest, start, stop = job
    sample_indices = range(start, min(stop, manifest.num_samples))
    return np.array([_measure(read_image(manifest, k), decoding) for k in sample_indices], MEASURES)


def _measure(data: bytes, decoding: Decoding) -> tuple[object, ...]:
    whole = digest(data)
    try:
        pixels = decode(data, decoding)
    except UnreadableImage:
        return whole, whole, np.zeros(HASH_SIDE**2 // 8, np.uint8), 0, 0, 0, (0, 0, 0)
    height, width, _ = pixels.shape
    shape = np.array(pixels.shape, np.uint32).tobytes()
    spread = max(int(pixels[..., c].max()) - int(pixels[..., c].min()) for c in range(3))
    colour = Image.fromarray(pixels).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    return whole, digest(shape, pixels.tobytes()), perceptual_hash(pixels), width, height, spread, colour


def digest(*data: bytes) -> bytes:
    """Return the BLAKE2b of some bytes, 16 bytes long."""
    state = hashlib.blake2b(digest_size=16)
    for piece in data:
        state.update(piece)
    return state.digest()


def perceptual_hash(pixels: Pixels) -> NDArray[np.uint8]:
    """Return (32,) bytes that differ in few bits for images that look alike."""
    from scipy.fft import dct

    grey = Image.fromarray(pixels).convert("L").resize((_THUMBNAIL_SIDE,) * 2, Image.Resampling.LANCZOS)
    frequencies = dct(dct(np.asarray(grey, np.float64), axis=0), axis=1)[:HASH_SIDE, :HASH_SIDE]
    return np.packbits(frequencies > np.median(frequencies))
