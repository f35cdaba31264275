"""What a model's bits per byte are worth: a byte bigram model and two compressors.

All three are measured on the same held-out bytes as the model. The compressors start empty and
see the held-out bytes alone, as `gzip -9 FILE` would; the bigram model is counted on the training
bytes, as the model is trained on them.
"""

from __future__ import annotations

import gzip
import lzma

import numpy as np

BYTES = 256


def bits_per_byte(train: bytes, held_out: bytes) -> dict[str, float]:
    """Each baseline's name and its bits per byte on `held_out`, from the weakest to the best known.

    ValueError when one of the two is empty.
    """
    return {
        "byte bigram": bigram_bits_per_byte(train, held_out),
        "gzip -9": gzip_bits_per_byte(held_out),
        "xz -9": xz_bits_per_byte(held_out),
    }


def bigram_bits_per_byte(train: bytes, held_out: bytes) -> float:
    """Cross entropy of `held_out` in bits per byte under a byte bigram model counted on `train`.

    p(y | x) = (count(xy) + p(y)) / (count(x) + 1): the byte frequencies p, themselves with one
    added to each count, weigh as much as one observation of x. p predicts the first byte.
    """
    _check_not_empty("train", train)
    _check_not_empty("held_out", held_out)
    seen = np.frombuffer(train, np.uint8).astype(np.int64)
    pairs = np.bincount(seen[:-1] * BYTES + seen[1:], minlength=BYTES * BYTES)
    pairs = pairs.reshape(BYTES, BYTES)
    frequency = (np.bincount(seen, minlength=BYTES) + 1) / (len(seen) + BYTES)
    given = (pairs + frequency) / (pairs.sum(axis=1, keepdims=True) + 1)
    text = np.frombuffer(held_out, np.uint8)
    bits = -np.log2(given[text[:-1], text[1:]]).sum() - np.log2(frequency[text[0]])
    return float(bits) / len(held_out)


def gzip_bits_per_byte(held_out: bytes) -> float:
    """Bits per byte of what `gzip -9` writes for `held_out`, its header counted."""
    _check_not_empty("held_out", held_out)
    return 8 * len(gzip.compress(held_out, compresslevel=9)) / len(held_out)


def xz_bits_per_byte(held_out: bytes) -> float:
    """Bits per byte of what `xz -9` writes for `held_out`, its container counted."""
    _check_not_empty("held_out", held_out)
    return 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)


def _check_not_empty(name: str, text: bytes) -> None:
    if not text:
        raise ValueError(f"{name}: expected at least one byte, found none")
