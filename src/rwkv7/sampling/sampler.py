"""One text's sampler: its settings, its random numbers and the tokens that it has drawn.

How logits become a token is in `batch`; here is what has to be known beside them, all of it on the
host and small enough to be saved with a session.
"""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .batch import sample_batch

ORDERS = ("rwkv", "hf")

_NUMBERS = {
    **{"temperature": float, "top_k": int, "top_p": float, "min_p": float},
    **{"presence": float, "frequency": float, "decay": float, "seed": int, "draws": int},
}
_FIELDS = (*_NUMBERS, "order", "exempt", "counts")
_DRAWS_AT_ONCE = 64  # making Philox costs more than a few dozen of its numbers


class Sampler:
    """Draws token ids. The same settings, seed and past give the same next token.

    Penalties come first, whatever the order: the logit of every token drawn before is lowered by
    presence + frequency · count, where a count rises by one each time its token is drawn (by none
    for an exempt one) and all counts are multiplied by `decay` just before. What is cut off then
    depends on the order. A cut never separates equally probable tokens: those as probable as the
    last one kept stay too.

    - "rwkv", as BlinkDL's package does it (rwkv/utils.py): top-p on the probabilities as the model
      gives them, top-k, and temperature on what is left.
    - "hf", as transformers does it: temperature, then top-k, then top-p on what that left.

    min-p compares with the most probable token, at the temperature that top-p sees.

    Args:
        temperature: 0 takes the most probable token (of equals the first) and draws nothing; 1
            leaves probabilities as they are; more flattens them, less sharpens them.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach top_p together; 1 keeps all.
        seed: an int from 0 to 2^64 - 1; None picks one, kept in `sampler.seed`.
        min_p: keep tokens at least min_p times as probable as the most probable; 0 keeps all.
        presence, frequency: what is taken off a logit for a token that was drawn, and for every
            time it was; negative ones favour repetition.
        decay: from 0 to 1; 0.996 is usual with RWKV, 1 never forgets a token.
        exempt: ids whose count never rises, so that only `presence` meets them.
        order: "rwkv" or "hf".

    Raises ValueError for a setting outside its range, TypeError for one that is no number.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        min_p: float = 0.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        decay: float = 1.0,
        exempt: Collection[int] = (),
        order: str = "rwkv",
    ) -> None:
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        settings |= {"presence": presence, "frequency": frequency, "decay": decay}
        if seed is not None:
            settings["seed"] = seed
        for name, value in settings.items():
            if not _is_number(value, kind := _NUMBERS[name]):
                what = "an int" if kind is int else "a number"
                raise TypeError(f"{name}: expected {what}, found {value!r}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature: expected a number of at least 0, found {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 keeps every token), found {top_k}")
        for name, share in (("top_p", top_p), ("min_p", min_p), ("decay", decay)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, found {share}")
        for name, penalty in (("presence", presence), ("frequency", frequency)):
            if not math.isfinite(penalty):
                raise ValueError(f"{name}: expected a finite number, found {penalty}")
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected an int from 0 to 2^64 - 1, found {seed}")
        if order not in ORDERS:
            raise ValueError(f'order: expected "rwkv" or "hf", found {order!r}')
        # Plain numbers, which a session's file can hold: numpy's are none.
        self.temperature, self.top_k = float(temperature), int(top_k)
        self.top_p, self.min_p = float(top_p), float(min_p)
        self.presence, self.frequency = float(presence), float(frequency)
        self.decay, self.order = float(decay), order
        self.exempt = frozenset(operator.index(token) for token in exempt)
        # Short enough to be read off a screen and typed again.
        self.seed = secrets.randbelow(10**9) if seed is None else int(seed)
        self.draws = 0
        self._uniforms = (0, np.empty(0))  # the number of the first, and it with those after it
        self.forget()

    def sample(self, logits: Tensor) -> int:
        """The next token's id from logits [V] of any dtype, on any device; -inf rules one out.

        The same as `sample_batch` gives for it in any company. Raises ValueError for another
        shape, for NaN, and where no token is possible.
        """
        if logits.dim() != 1 or logits.numel() == 0:
            raise ValueError(f"logits: expected [V], found the shape {list(logits.shape)}")
        (token,) = sample_batch(logits[None], [self])
        if token is None:
            raise ValueError(
                f"logits: expected numbers, found {float(logits.max())} as the largest"
            )
        return token

    @property
    def counts(self) -> dict[int, float]:
        """The tokens drawn and their counts, as the next draw will see them."""
        return dict(zip(self._places, self._counts[: len(self._places)].tolist(), strict=True))

    def forget(self) -> None:
        """Drop all counts, as at the start of a new text; settings and random numbers stay."""
        self._places: dict[int, int] = {}
        self._largest = -1  # of the ids in it
        self._tokens, self._counts = np.empty(8, np.int64), np.empty(8)

    def state_dict(self) -> dict[str, Any]:
        """The settings, the seed, the number of draws so far and the counts, for JSON."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        counts = [list(pair) for pair in self.counts.items()]
        return {**numbers, "order": self.order, "exempt": sorted(self.exempt), "counts": counts}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Sampler:
        """The inverse of `state_dict`; ValueError names what does not fit."""
        if set(state) != set(_FIELDS):
            raise ValueError(f"sampler: expected {', '.join(_FIELDS)}, found {', '.join(state)}")
        for name, kind in _NUMBERS.items():
            if not _is_number(state[name], kind):
                raise ValueError(f"sampler: {name} should be {kind.__name__}, is {state[name]!r}")
        exempt, counts = state["exempt"], state["counts"]
        if not isinstance(exempt, list) or not all(_is_number(x, int) for x in exempt):
            raise ValueError("sampler: exempt should be a list of ids")
        if not isinstance(counts, list) or not all(map(_is_count, counts)):
            raise ValueError("sampler: counts should be a list of pairs, an id and its count")
        settings = {name: x for name, x in state.items() if name not in ("draws", "counts")}
        if not 0 <= state["draws"] < 2**64:
            raise ValueError(f"sampler: draws should be from 0 to 2^64 - 1, is {state['draws']}")
        sampler = cls(**settings)
        sampler.draws = state["draws"]
        for token, count in counts:
            place = sampler._place(token)
            sampler._counts[place] = count
        return sampler

    def check(self, vocabulary: int) -> None:
        """ValueError when it has drawn a token that is not among `vocabulary` ids."""
        if self._largest >= vocabulary:
            raise ValueError(
                f"sampler: expected draws from a vocabulary of {vocabulary}, found the token "
                f"{self._largest} among its own; it belongs to another model"
            )

    @property
    def seen(self) -> int:
        """How many different ids are counted."""
        return len(self._places)

    def past(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        """Fill both, [seen] each, with the ids drawn before and their counts."""
        tokens[:] = self._tokens[: len(tokens)]
        counts[:] = self._counts[: len(counts)]

    def uniform(self) -> float:
        """The number from [0, 1) that the next draw uses; it stays the same until `accept`."""
        # A counter-based generator: draw n of a seed needs no draw before it, so that two numbers
        # are all the state there is. The raw bits of Philox are the same in every version.
        first, values = self._uniforms
        if not first <= self.draws < first + len(values):
            generator = np.random.Philox(key=self.seed, counter=self.draws)
            raw = generator.random_raw(4 * _DRAWS_AT_ONCE)[::4]  # four to each step of the counter
            first, values = self._uniforms = (self.draws, (raw >> np.uint64(11)) * 2.0**-53)
        return float(values[self.draws - first])

    def accept(self, token: int) -> None:
        """Take note that `token` was drawn."""
        self.draws += self.temperature > 0
        if self.presence == self.frequency == 0:
            return
        if self.decay != 1:
            self._counts[: len(self._places)] *= self.decay
        place = self._place(token)
        self._counts[place] += token not in self.exempt

    def _place(self, token: int) -> int:
        """Where the count of `token` is; that of a new one begins at 0."""
        if token not in self._places:
            place = self._places[token] = len(self._places)
            if place == len(self._tokens):
                self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
                self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
            self._tokens[place], self._counts[place] = token, 0.0
            self._largest = max(self._largest, token)
        return self._places[token]


def _is_number(x: object, kind: type) -> bool:
    accepted = numbers.Real if kind is float else numbers.Integral  # numpy's are among them
    return isinstance(x, accepted) and not isinstance(x, bool)


def _is_count(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or not _is_number(pair[0], int):
        return False
    return _is_number(pair[1], float) and math.isfinite(pair[1]) and 0 <= pair[0] < 2**63
