"""The states of all running requests, in memory taken once, and how much memory that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.config import ModelConfig
from rwkv7.nn import parameter_count
from rwkv7.state import LayerState, ModelState, wide_dtype

from .request import check_count

# States are kept at multiples of this many tokens, and deterministic pieces end there.
PIECE = 256
# Prompts read in one call; bounds the copies of states that the call makes.
READ_TOGETHER = 64


class Pool:
    """States in numbered slots, which are taken and given back.

    Attributes:
        state: all of them as one ModelState, for `RWKV7.step_`: P = slots + 1 rows, the last of
            which is what padded rows of a step write to.
    """

    def __init__(
        self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        L, P, H, N = config.layers, slots + 1, config.heads, config.head_size
        # One tensor for all layers: a slot is filled by two launches on a GPU, not by two a layer.
        self._wkv = torch.zeros(L, P, H, N, N, dtype=wide_dtype(dtype), device=device)
        self._shifts = torch.zeros(2, L, P, config.width, dtype=dtype, device=device)
        self.slots = slots
        self.state = _layers(self._wkv, self._shifts)
        self._free = list(reversed(range(slots)))

    @property
    def free(self) -> int:
        """How many slots nobody has."""
        return len(self._free)

    def take(self) -> int:
        """A slot, holding what was left in it; IndexError when none is free."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Let others have it."""
        self._free.append(slot)

    def clear(self, slots: Sequence[int]) -> None:
        """The state before the first token, in each of `slots`."""
        index = self._index(slots)
        self._wkv.index_fill_(1, index, 0)
        self._shifts.index_fill_(2, index, 0)

    def read(self, slots: Sequence[int] | Tensor) -> ModelState:
        """A copy of the states in `slots`, one row each."""
        index = self._index(slots)
        return _layers(self._wkv.index_select(1, index), self._shifts.index_select(2, index))

    def write(self, slots: Sequence[int] | Tensor, state: ModelState) -> None:
        """Put row i of `state`, on any device, into the i-th of `slots`."""
        index, layers = self._index(slots), state.layers
        self._wkv.index_copy_(1, index, torch.stack([x.wkv for x in layers]).to(self._wkv))
        shifts = [[x.time_shift for x in layers], [x.channel_shift for x in layers]]
        stacked = torch.stack([torch.stack(part) for part in shifts])
        self._shifts.index_copy_(2, index, stacked.to(self._shifts))

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Put the state in `source` into each of `targets`."""
        for target in targets:
            self._wkv[:, target].copy_(self._wkv[:, source])
            self._shifts[:, :, target].copy_(self._shifts[:, :, source])

    def _index(self, slots: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(slots, dtype=torch.int64).to(self._wkv.device)


def _layers(wkv: Tensor, shifts: Tensor) -> ModelState:
    layers = zip(wkv.unbind(), shifts[0].unbind(), shifts[1].unbind(), strict=True)
    return ModelState(tuple(LayerState(*layer) for layer in layers))


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that an engine holds, all taken at its start but for `working`, its most in a step."""

    weights: int
    states: int  # the pool
    state: int  # one of its slots
    working: int  # an upper estimate of a step's temporaries

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.states + self.working


def memory_budget(
    config: ModelConfig,
    slots: int,
    dtype: torch.dtype = torch.bfloat16,
    max_prefill_tokens: int = 2048,
) -> MemoryBudget:
    """What `Engine(model, slots=…, max_prefill_tokens=…)` takes for a model in this dtype.

    ValueError for fewer than one slot or token.
    """
    check_sizes(slots, max_prefill_tokens)
    weights = parameter_count(config) * dtype.itemsize
    C, wide = config.width, wide_dtype(dtype).itemsize
    wkv = config.layers * C * config.head_size * wide
    state = wkv + 2 * config.layers * C * dtype.itemsize
    # Of a call: the projections and their float32 forms, the hidden layer of channel mix; of the
    # states in it, those read, those made and their stack; the logits and what samplers make.
    call = max_prefill_tokens * (C * (24 * dtype.itemsize + 16 * wide) + 12 * C * dtype.itemsize)
    step = slots * (C * (36 * dtype.itemsize + 16 * wide) + 4 * wkv // config.layers)
    step += slots * config.vocab_size * (dtype.itemsize + 2 * 8)
    read = max(min(slots, READ_TOGETHER), 2 * max_prefill_tokens // PIECE)  # in one call
    working = max(call + 3 * read * state, step)
    return MemoryBudget(weights, (slots + 1) * state, state, working)


def check_sizes(slots: int, max_prefill_tokens: int) -> None:
    """ValueError or TypeError unless both are at least 1."""
    for name, value in (("slots", slots), ("max_prefill_tokens", max_prefill_tokens)):
        check_count(name, value, 1)
