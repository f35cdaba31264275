"""In which order the windows of a row of tokens are read: pure functions of the sample's number.

Nothing to save and nothing to replay on resume. An epoch visits every window once, without a list
of the windows in memory.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Protocol

from rwkv7.training.settings import ORDERS

__all__ = ["OfficialOrder", "Order", "ShuffledOrder", "make_order", "seeded_hash"]

ROUNDS = 4  # of the Feistel network; four make a permutation that looks random
GOLDEN = (math.sqrt(5) - 1) / 2  # RWKV-LM, RWKV-v7/train_temp/src/dataset.py
LEAST_SHARE = 0.9  # of the windows that a prime must reach, ibid.


class Order(Protocol):
    """Where windows begin. `per_epoch` samples visit each window of an epoch once."""

    @property
    def per_epoch(self) -> int: ...

    def start(self, sample: int) -> int:
        """The first token of the window of the given sample (from 0, over all epochs)."""
        ...


class ShuffledOrder:
    """A pseudo-random order of its own in each epoch, the borders moved from epoch to epoch."""

    def __init__(self, tokens: int, window: int, seed: int) -> None:
        """Windows of `window` tokens, and one more behind each, out of a row of `tokens`."""
        self._window, self._seed = window, seed
        self.per_epoch = max(1, (tokens - window) // window)
        self._spare = tokens - 1 - self.per_epoch * window

    def start(self, sample: int) -> int:
        """The first token of the window of the given sample."""
        epoch, number = divmod(sample, self.per_epoch)
        offset = seeded_hash(self._seed, epoch) % (min(self._spare, self._window - 1) + 1)
        return offset + self._permuted(number, epoch) * self._window

    def _permuted(self, number: int, epoch: int) -> int:
        """A permutation of range(per_epoch): a Feistel network on the next even power of two.

        It is a bijection there, so walking on from a value outside the range ends inside it, and
        the whole stays a bijection.
        """
        half = max(1, ((self.per_epoch - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        while True:
            left, right = number >> half, number & mask
            for turn in range(ROUNDS):
                left, right = right, left ^ (seeded_hash(self._seed, epoch, turn, right) & mask)
            number = left << half | right
            if number < self.per_epoch:
                return number


class OfficialOrder:
    """RWKV-LM's order, sample for sample: cubes modulo a prime p of the form 3n + 2.

    There cubing is a bijection, so p samples visit p windows once, in the same order every epoch.
    The prime is the one that RWKV-LM's make_data.py names for these tokens and this window.
    """

    def __init__(self, tokens: int, window: int) -> None:
        """ValueError where the windows are so few that no prime reaches nine tenths of them."""
        slots = tokens // window
        prime = next((n for n in range(slots - 1, 1, -1) if n % 3 == 2 and _is_prime(n)), 0)
        if prime <= LEAST_SHARE * slots:
            raise ValueError(
                f"order: the official order would leave out more than a tenth of {slots} windows "
                f"(it takes a prime number of them, here {prime}): use the order shuffled, more "
                "text, or a smaller window"
            )
        self.per_epoch, self._window = prime, window
        self._factor = int(prime * GOLDEN)

    def start(self, sample: int) -> int:
        """The first token of the window of the given sample."""
        number = sample + 1
        return self._factor * number**3 % self.per_epoch * self._window


def make_order(name: str, tokens: int, window: int, seed: int) -> Order:
    """The order called `name`; the official one knows no seed.

    Raises ValueError for another name, or where the tokens do not make a window.
    """
    if name not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, found {name!r}")
    if tokens < window + 1:
        raise ValueError(
            f"text: expected at least {window + 1} tokens to train on (a window of {window} "
            f"and the token after it), found {tokens}: give more text, hold out less, or "
            "use a smaller window"
        )
    return (
        ShuffledOrder(tokens, window, seed) if name == "shuffled" else OfficialOrder(tokens, window)
    )


def seeded_hash(*values: int) -> int:
    """64 bits that depend on all the values, the same on every machine and for ever."""
    key = ":".join(map(str, values)).encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
