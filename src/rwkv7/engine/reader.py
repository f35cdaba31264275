"""Parts of prompts read in one packed call: in lanes of fixed length, or as a CUDA graph.

What is read, and when, is `prefill`'s; this decides in which shapes the model is called.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rwkv7.nn import RWKV7
from rwkv7.state import ModelState
from rwkv7.wkv7 import batch_invariant, unchecked

from .capture import captured, graph_memory
from .pool import READ_TOGETHER, Pool

# Captured calls: the fewest tokens of one, and how many of them go to a sequence. Others have
# twice as many tokens as the one before; the rest of a call is filled up.
_FEWEST_TOKENS, _TOKENS_A_PART = 128, 32


class Reader:
    """Advances states in slots of a pool by tokens.

    Args:
        model: on the device of the pool.
        pool: rows of it change; its last row, nobody's, holds whatever was left over.
        max_tokens: of one call.
        piece: the length of a lane for `deterministic=True`, None for packed calls. A call has as
            many lanes as fit, whoever uses them, or fewer if that gives the same bits. Where lanes
            give the same tokens other bits (a machine whose products treat rows unequally), there
            is only one.
        graphs: capture calls as CUDA graphs; nothing is captured elsewhere than on a GPU.

    Attributes:
        most: how many parts one call takes.
    """

    def __init__(
        self, model: RWKV7, pool: Pool, max_tokens: int, piece: int | None, graphs: bool
    ) -> None:
        self._model, self._pool, self._piece = model, pool, piece
        self._calls: dict[tuple[int, int], Callable[[Tensor], None]] = {}
        captures = graphs and model.device.type == "cuda"
        if piece is not None:
            self._lanes = self._lanes_that_agree(max(1, max_tokens // piece))
            self.most = self._lanes[-1]
            shapes = [(lanes * piece, 2 * lanes) for lanes in reversed(self._lanes)]
        else:
            self.most = min(READ_TOGETHER, max_tokens)
            shapes = _shapes(max_tokens, min(self.most, pool.slots))
            if captures:
                self.most = shapes[0][1] - 1
        if captures:
            memory = graph_memory()
            for tokens, sequences in shapes:
                run = functools.partial(self._call, tokens)
                given = self._packed([], [], tokens, sequences).to(model.device)
                self._calls[tokens, sequences] = captured(run, given, memory)

    def __call__(self, parts: Sequence[Tensor], slots: Sequence[int]) -> None:
        """Read `parts`, `most` of them at most, on from the states in `slots`, all different."""
        total = sum(map(len, parts))
        if self._piece is not None:
            lanes = next(lanes for lanes in self._lanes if lanes >= len(parts))
            shape = (lanes * self._piece, 2 * lanes)
            given = self._in_lanes(parts, slots, lanes)
        else:
            shape = self._shape(total, len(parts))
            given = self._packed(parts, slots, *shape)
        run = self._calls.get(shape) or functools.partial(self._call, shape[0])
        run(given)

    def _shape(self, tokens: int, parts: int) -> tuple[int, int]:
        """The smallest captured call that holds them, if there is one: (tokens, sequences)."""
        if (tokens, parts) in self._calls:
            return tokens, parts
        fits = [shape for shape in self._calls if shape[0] >= tokens and shape[1] > parts]
        return min(fits, default=(tokens, parts))

    def _packed(
        self, parts: Sequence[Tensor], slots: Sequence[int], tokens: int, sequences: int
    ) -> Tensor:
        """Tokens, offsets and rows of the pool in one tensor; nobody's row takes what is left."""
        ends = list(itertools.accumulate(map(len, parts)))
        filling = sequences - len(parts)
        rest = torch.zeros(tokens - sum(map(len, parts)), dtype=torch.int64)
        rows = [*slots, *[self._pool.slots] * filling]
        numbers = torch.tensor([0, *ends, *[tokens] * filling, *rows])
        return self._pinned(torch.cat((*parts, rest, numbers)))

    def _in_lanes(self, parts: Sequence[Tensor], slots: Sequence[int], lanes: int) -> Tensor:
        """Each part at the start of a lane of its own; what fills a lane is another sequence."""
        assert self._piece is not None
        nobody = self._pool.slots
        tokens = torch.zeros(lanes, self._piece, dtype=torch.int64)
        ends, rows = [], []
        for lane in range(lanes):
            size, slot = (len(parts[lane]), slots[lane]) if lane < len(parts) else (0, nobody)
            if size:
                tokens[lane, :size] = parts[lane]
            ends += [lane * self._piece + size, (lane + 1) * self._piece]
            rows += [slot, nobody]
        return self._pinned(torch.cat((tokens.flatten(), torch.tensor([0, *ends, *rows]))))

    def _pinned(self, given: Tensor) -> Tensor:
        return given.pin_memory() if self._model.device.type == "cuda" else given

    def _call(self, tokens: int, given: Tensor) -> None:
        rows = given[-((len(given) - tokens) // 2) :]
        self._pool.write(rows, self._states(tokens, given))

    def _states(self, tokens: int, given: Tensor) -> ModelState:
        """The states after what `_packed` or `_in_lanes` made of parts of so many tokens in all."""
        given = given.to(self._model.device, non_blocking=True)
        sequences = (len(given) - tokens) // 2
        ids, offsets, rows = given.split((tokens, sequences + 1, sequences))
        mode = contextlib.nullcontext if self._piece is None else batch_invariant
        packed = offsets if sequences > 1 else None
        with mode(), unchecked():
            return self._model.hidden(ids[None], self._pool.read(rows), packed)[1]

    def _lanes_that_agree(self, most: int) -> tuple[int, ...]:
        """How many lanes a call may have, so that each gives the same tokens the same bits."""
        assert self._piece is not None
        part = torch.arange(self._piece) % self._model.config.vocab_size
        slot = self._pool.slots
        found: list[int] = []
        for lanes in (most, *(1 << k for k in reversed(range((most - 1).bit_length())))):
            self._pool.clear([slot])
            given = self._in_lanes([part] * lanes, [slot] * lanes, lanes)
            state = self._states(lanes * self._piece, given).select(range(0, 2 * lanes, 2))
            if not found:
                expected = state.select([0])
            pairs = zip(_tensors(state), _tensors(expected), strict=True)
            if all(bool((x == e).all()) for x, e in pairs):
                found.append(lanes)
            elif not found:
                return (1,)
        return tuple(reversed(found))


def _tensors(state: ModelState) -> Iterator[Tensor]:
    return (x for layer in state.layers for x in layer)


def _shapes(max_tokens: int, parts: int) -> list[tuple[int, int]]:
    """The calls to capture, the largest first: (tokens, sequences), one of which fills up.

    And one of a single prompt that has more to read than a call takes.
    """
    sizes = [max_tokens]
    while sizes[-1] > _FEWEST_TOKENS:
        sizes.append(-(-sizes[-1] // 2))
    shapes = [(size, 1 + min(parts, max(1, size // _TOKENS_A_PART))) for size in sizes]
    return [*shapes, (max_tokens, 1)]
