"""How probable a model finds texts and continuations, as token ids, in packed batches.

What several sequences begin with is read once and its state forked. Text, files and tasks are left
to tasks.py, which builds on this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rwkv7.nn import RWKV7
from rwkv7.state import ModelState, wide_dtype

__all__ = [
    "LOGITS_AT_ONCE",
    "Score",
    "carried_bits",
    "score",
    "scores_as_they_come",
    "summed_bits",
]

Item = TypeVar("Item")
Prefixed = tuple[tuple[int, ...], list[int]]  # a prefix, and the numbers of the pairs with it

CARRIED_WINDOW = 2048  # tokens at a time; any number gives the same bits within rounding
LOGITS_AT_ONCE = 1 << 26  # numbers; fewer tokens are taken at once where the vocabulary is large
PACKED_TOKENS = 8192  # in one packed call, unless a single sequence is longer
FORKED_STATES = 64  # held at once while their continuations are read


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The natural logarithm of a continuation's probability, and whether greedy choice gives it."""

    log_probability: float
    greedy: bool


@torch.no_grad()
def carried_bits(
    model: RWKV7,
    tokens: np.ndarray | Sequence[int],
    state: ModelState | None = None,
    window: int = CARRIED_WINDOW,
    on_read: Callable[[int], None] | None = None,
) -> float:
    """The bits of all tokens but the first, read in one go from `state`, None for an empty one.

    `window` is how many tokens the model gets at a time; the state is carried on to the next ones.
    After each window `on_read` hears of how many tokens the bits are counted.
    """
    bits, last = 0.0, len(tokens) - 1
    window = min(window, max(1, LOGITS_AT_ONCE // model.config.vocab_size))
    for start in range(0, last, window):
        stop = min(start + window, last)
        row = _ids(tokens[start : stop + 1], model)[None]
        logits, state = model(row[:, :-1], state)
        bits += summed_bits(logits, row[:, 1:])
        if on_read is not None:
            on_read(stop)
    return bits


def summed_bits(logits: Tensor, targets: Tensor) -> float:
    """The bits that logits [B, T, V] charge for targets [B, T], summed; nothing for -100."""
    flat = logits.flatten(0, 1).to(wide_dtype(logits.dtype))
    return functional.cross_entropy(flat, targets.flatten(), reduction="sum").item() / math.log(2)


def score(
    model: RWKV7,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    on_read: Callable[[int], None] | None = None,
) -> list[Score]:
    """How probable each continuation is after its context, as if each pair were read alone.

    Args:
        model: in evaluation mode; on any device.
        pairs: of context and continuation, ids; a context has at least one. Contexts that are
            equal, or begin alike, may come in any order: what they share is read once.
        on_read: hears after each pair how many are read.

    Raises ValueError for a pair without context. A continuation without ids has probability 1.
    """
    found: dict[int, Score] = {}
    for i, result in scores_as_they_come(model, pairs):
        found[i] = result
        if on_read is not None:
            on_read(len(found))
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def scores_as_they_come(
    model: RWKV7, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, Score]]:
    """What `score` gives, each with its pair's number, in the order in which they are read."""
    contexts = [tuple(context) for context, _ in pairs]
    if not all(contexts):
        raise ValueError("pairs: expected a context of at least one id, found an empty one")
    # The last id of a context is read with the continuation, whose first id it predicts.
    order = sorted(range(len(pairs)), key=lambda i: contexts[i][:-1])
    groups = itertools.groupby(order, key=lambda i: contexts[i][:-1])
    by_prefix = [(prefix, list(members)) for prefix, members in groups]
    batches = list(_batches(by_prefix))
    trunk = _Trunk(model)
    for number, batch in enumerate(batches, 1):
        after = batches[number][-1][0] if number < len(batches) else None
        states = trunk.states([prefix for prefix, _ in batch], after)
        rows = [(row, i) for row, (_, members) in enumerate(batch) for i in members]
        for some in _bounded(rows, lambda x: 1 + len(pairs[x[1]][1])):
            forked = states.select([row for row, _ in some])
            inputs = [(contexts[i][-1], *pairs[i][1][:-1]) for _, i in some]
            targets = [pairs[i][1] for _, i in some]
            scores = _continued(model, forked, inputs, targets)
            yield from zip((i for _, i in some), scores, strict=True)


def _batches(by_prefix: list[Prefixed]) -> Iterator[list[Prefixed]]:
    """Neighbours in the order of their prefixes, whose states are made in one packed call.

    What all of a batch begin with counts once, as it is read once.
    """
    batch: list[Prefixed] = []
    total = 0
    for item in by_prefix:
        prefix = item[0]
        shared = _shared(batch[0][0], prefix) if batch else 0
        read = total + len(prefix) - len(batch) * shared
        if batch and (len(batch) == FORKED_STATES or read + len(batch) >= PACKED_TOKENS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += len(prefix)
    if batch:
        yield batch


def _bounded(items: Sequence[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """`items` in lists whose sizes add up to at most PACKED_TOKENS, or of a single larger one."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and total + size(item) > PACKED_TOKENS:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def _shared(first: Sequence[int], last: Sequence[int]) -> int:
    """How many ids both begin with; of a sorted list's ends, how many all of it begin with."""
    pairs = enumerate(zip(first, last, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))


class _Trunk:
    """What the prefixes of one batch and the next all begin with, and the state after it."""

    def __init__(self, model: RWKV7) -> None:
        self._model = model
        self._ids: tuple[int, ...] = ()
        self._state = self._empty = ModelState.zeros(model.config, 1, model.dtype, model.device)

    def states(self, prefixes: list[tuple[int, ...]], after: tuple[int, ...] | None) -> ModelState:
        """The state after each of the sorted `prefixes`; what all of them begin with is read once.

        `after`, the last prefix of the batch to come, says what is worth keeping for that one.
        """
        first, shared = prefixes[0], _shared(prefixes[0], prefixes[-1])
        if first[:shared][: len(self._ids)] != self._ids:
            self._ids, self._state = (), self._empty
        kept = min(shared, 0 if after is None else _shared(first, after))
        if kept > len(self._ids):
            self._state = self._read(first[len(self._ids) : kept], self._state)
            self._ids = first[:kept]
        state = self._read(first[len(self._ids) : shared], self._state)
        rests = [prefix[shared:] for prefix in prefixes]
        _, states = _packed(self._model, rests, state.select([0] * len(rests)))
        return states

    def _read(self, tokens: tuple[int, ...], state: ModelState) -> ModelState:
        for start in range(0, len(tokens), PACKED_TOKENS):
            piece = _ids(tokens[start : start + PACKED_TOKENS], self._model)[None]
            _, state = self._model.hidden(piece, state)
        return state


def _packed(
    model: RWKV7, rows: Sequence[Sequence[int]], state: ModelState
) -> tuple[Tensor, ModelState]:
    """What the head reads of all `rows`, [T, C], one after the other, and their states."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, rows))], device=model.device)
    tokens = _ids([token for row in rows for token in row], model)
    features, state = model.hidden(tokens[None], state, offsets)
    return features[0], state


def _continued(
    model: RWKV7,
    state: ModelState,
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> list[Score]:
    # A continuation without ids predicts nothing: its row reads nothing either.
    read = [row[: len(wanted)] for row, wanted in zip(inputs, targets, strict=True)]
    features, _ = _packed(model, read, state)
    wanted = _ids([token for row in targets for token in row], model)
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    chosen, likeliest = [features.new_empty(0, dtype=torch.float64)], [wanted.new_empty(0)]
    for start in range(0, len(wanted), at_once):
        logits = model.head(features[start : start + at_once])
        log_p = logits.to(wide_dtype(logits.dtype)).log_softmax(1)
        picked = log_p.gather(1, wanted[start : start + at_once, None])
        chosen.append(picked[:, 0].double())
        likeliest.append(log_p.argmax(1))
    sizes = [len(row) for row in targets]
    hits = torch.cat(likeliest) == wanted
    parts = zip(torch.cat(chosen).cpu().split(sizes), hits.cpu().split(sizes), strict=True)
    return [Score(log_probability=float(p.sum()), greedy=bool(hit.all())) for p, hit in parts]


def _ids(tokens: np.ndarray | Sequence[int], model: RWKV7) -> Tensor:
    return torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(model.device)
