"""Choosing the next token from logits: greedy, or drawn at random and repeatable.

The order is RWKV's own (BlinkDL/ChatRWKV, rwkv_pip_package/src/rwkv/utils.py): top-p on the
probabilities as the model gives them, then top-k, then temperature on what is left. Libraries that
apply temperature first keep other tokens for the same three numbers. Penalties are not offered.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FIELDS = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "draws": int}


class Sampler:
    """Draws token ids. The same settings, seed and number of draws give the same next token.

    Args:
        temperature: 0 takes the most probable token and draws nothing; 1 leaves probabilities as
            they are; more flattens them, less sharpens them.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach top_p together, and any that are
            as probable as the last of them; 1 keeps all.
        seed: an int from 0 to 2^64 - 1; None picks one, kept in `sampler.seed`.

    Raises ValueError for a number outside its range.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature: expected a number of at least 0, found {temperature}")
        if top_k < 0:
            raise ValueError(f"top_k: expected at least 0 (0 keeps every token), found {top_k}")
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p: expected a number from 0 to 1, found {top_p}")
        if seed is not None and not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected an int from 0 to 2^64 - 1, found {seed}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        # Short enough to be read off a screen and typed again.
        self.seed = secrets.randbelow(10**9) if seed is None else seed
        self.draws = 0

    def sample(self, logits: Tensor) -> int:
        """The next token's id from logits [V] of any dtype, on any device; -inf rules one out.

        Raises ValueError for another shape, for NaN, and where no token is possible.
        """
        if logits.dim() != 1 or logits.numel() == 0:
            raise ValueError(f"logits: expected [V], found the shape {list(logits.shape)}")
        # In float64 on the CPU, so that a draw does not depend on the device or its reductions.
        logits = logits.detach().cpu().double()
        if not bool(logits.max() < math.inf) or bool(logits.max() == -math.inf):
            raise ValueError(
                f"logits: expected numbers, found {float(logits.max())} as the largest"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        log_p, tokens = logits.log_softmax(0).sort(descending=True, stable=True)
        kept = self._kept(log_p.exp())
        # Divided before the exponential: a low temperature then underflows to greedy, not to 0/0.
        weights = ((log_p[:kept] - log_p[0]) / self.temperature).exp()
        below = weights.cumsum(0)
        place = int(torch.searchsorted(below, self._uniform() * below[-1], right=True))
        return int(tokens[min(place, kept - 1)])

    def state_dict(self) -> dict[str, float]:
        """The settings, the seed and the number of draws so far, for JSON."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Sampler:
        """The inverse of `state_dict`; ValueError names what does not fit."""
        if set(state) != set(_FIELDS):
            raise ValueError(f"sampler: expected {', '.join(_FIELDS)}, found {', '.join(state)}")
        for name, kind in _FIELDS.items():
            accepted = (int, float) if kind is float else int
            if not isinstance(state[name], accepted) or isinstance(state[name], bool):
                raise ValueError(f"sampler: {name} should be {kind.__name__}, is {state[name]!r}")
        settings = dict(state)
        draws = settings.pop("draws")
        if not 0 <= draws < 2**64:
            raise ValueError(f"sampler: draws should be from 0 to 2^64 - 1, is {draws}")
        sampler = cls(**settings)
        sampler.draws = draws
        return sampler

    def _kept(self, probabilities: Tensor) -> int:
        """How many of the sorted `probabilities` top-p and top-k leave, at least one."""
        kept = len(probabilities)
        if self.top_p < 1:
            # Rounding can leave the sum of all a little below a top_p that is almost 1.
            reached = (probabilities.cumsum(0) >= self.top_p).nonzero()
            last = probabilities[int(reached[0])] if len(reached) else probabilities[-1]
            kept = int((probabilities >= last).sum())
        return min(kept, self.top_k) if self.top_k else kept

    def _uniform(self) -> float:
        # A counter-based generator: draw n of a seed needs no draw before it, so that two numbers
        # are all the state there is. The raw bits of Philox are the same in every version.
        bits = np.random.Philox(key=self.seed, counter=self.draws).random_raw()
        self.draws += 1
        return (int(bits) >> 11) * 2.0**-53
