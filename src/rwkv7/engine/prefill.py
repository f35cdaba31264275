"""Reading prompts between decoding steps: packed, in bounded pieces, and from the prefix cache.

Which prompts are read, and what becomes of them afterwards, is the engine's affair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv7.nn import RWKV7
from rwkv7.state import ModelState
from rwkv7.wkv7 import batch_invariant, unchecked

from .job import Job
from .pool import PIECE, READ_TOGETHER, Pool
from .prefix_cache import PrefixCache


class Prefill:
    """Advances prompts in their slots of a pool.

    Args:
        model: on the device of the pool.
        pool: holds the state of each prompt between pieces.
        max_tokens: how many tokens one call of `read` may work through.
        deterministic: prompts are read in pieces that their own lengths decide, each in a lane of
            a call that is always as long, whoever has the other lanes. Where lanes give the same
            tokens other bits (a machine whose products treat rows unequally), there is only one.
        cache: None keeps no states.
    """

    def __init__(
        self,
        model: RWKV7,
        pool: Pool,
        max_tokens: int,
        deterministic: bool,
        cache: PrefixCache | None,
    ) -> None:
        self._model, self._pool, self._cache = model, pool, cache
        self._max_tokens = max_tokens
        self._deterministic = deterministic
        self._piece = min(PIECE, max_tokens)
        self._lanes = max(1, max_tokens // self._piece) if deterministic else 0  # 0: none
        if self._lanes > 1 and not self._lanes_agree():
            self._lanes = 1
        self._turn = 0  # whose it is, so that no prompt waits until a long one is read

    def read(self, jobs: list[Job]) -> None:
        """Read up to `max_tokens` more of the prompts of `jobs`, which share them fairly."""
        self._begin([job for job in jobs if not job.begun], jobs)
        unread = [job for job in jobs if job.begun and job.unread]
        if not unread:
            return
        turn = self._turn % len(unread)
        unread = unread[turn:] + unread[:turn]
        with unchecked():
            if self._deterministic:
                self._read_in_lanes(unread)
            else:
                self._turn += READ_TOGETHER if len(unread) > READ_TOGETHER else 0
                shares = _shares(unread, self._max_tokens)
                self._advance([(job, _to_next_mark(job, size)) for job, size in shares])

    def _begin(self, new: list[Job], jobs: list[Job]) -> None:
        """Set up slots; a prompt whose beginning another one is about to read waits for it."""
        expected = {name for job in jobs if job.begun for name in _expected(job, self._piece)}
        empty = []
        for job in new:
            state, position = job.state, 0
            if self._cache is not None and state is None:
                if not job.names:
                    self._plan(job, self._cache)
                if _waits(job.names, expected, self._cache):
                    continue
                count, state = self._cache.longest(job.names)
                position = count * self._piece
                expected.update(_expected(job, self._piece))
            job.begun, job.position, job.state = True, position, None
            job.marks = {mark for mark in job.marks if mark > position}
            if state is None:
                empty.append(job.slot)
            else:
                self._pool.write([job.slot], state)
        if empty:
            self._pool.clear(empty)

    def _plan(self, job: Job, cache: PrefixCache) -> None:
        # What is worth keeping: the longest beginning (a conversation will go on from there), where
        # this prompt parts from an earlier one, and a few more places, each twice as far as the
        # one before, where the next prompts may part from this one.
        job.names = cache.names(job.prompt, self._piece)
        whole = len(job.names)
        doubling = {1 << k for k in range(whole.bit_length())}
        counts = {whole, cache.seen_before(job.names), *doubling}
        job.marks = {count * self._piece for count in counts if 0 < count <= whole}

    def _read_in_lanes(self, jobs: list[Job]) -> None:
        chosen = jobs[: self._lanes]
        self._turn += len(chosen) if len(jobs) > len(chosen) else 0
        with batch_invariant():
            self._advance([(job, min(self._piece, job.unread)) for job in chosen])

    def _advance(self, pieces: list[tuple[Job, int]]) -> None:
        slots = [job.slot for job, _ in pieces]
        parts = [job.prompt[job.position : job.position + size] for job, size in pieces]
        run = self._run_lanes if self._lanes else self._run
        state = run(parts, slots)
        self._pool.write(slots, state)
        for row, (job, size) in enumerate(pieces):
            job.position += size
            if job.position in job.marks and self._cache is not None:
                name = job.names[job.position // self._piece - 1]
                if name not in self._cache:
                    self._cache.put(name, state.select([row]))

    def _run(self, parts: list[Tensor], slots: list[int]) -> ModelState:
        offsets = None
        if len(parts) > 1:
            sizes = torch.tensor([0, *map(len, parts)])
            offsets = sizes.cumsum(0).to(self._model.device)
        tokens = torch.cat(parts)[None].to(self._model.device)
        return self._model.hidden(tokens, self._pool.read(slots), offsets)[1]

    def _run_lanes(self, parts: list[Tensor], slots: list[int]) -> ModelState:
        """Each part at the start of a lane of its own; what fills a lane is another sequence."""
        tokens = torch.zeros(self._lanes, self._piece, dtype=torch.int64)
        lengths = torch.zeros(self._lanes, dtype=torch.int64)
        for lane, part in enumerate(parts):
            tokens[lane, : len(part)] = part
            lengths[lane] = len(part)
        starts = torch.arange(self._lanes) * self._piece
        offsets = torch.stack((starts, starts + lengths), 1).flatten()
        offsets = torch.cat((offsets, torch.tensor([tokens.numel()])))
        filling = self._pool.slots  # the row that is nobody's
        rows = [*slots, *[filling] * (self._lanes - len(slots))]
        state = self._pool.read([row for slot in rows for row in (slot, filling)])
        device = self._model.device
        _, state = self._model.hidden(tokens.view(1, -1).to(device), state, offsets.to(device))
        return state.select(range(0, 2 * len(parts), 2))

    def _lanes_agree(self) -> bool:
        """Whether the same tokens in every lane lead to the same bits."""
        part = torch.arange(self._piece) % self._model.config.vocab_size
        slot = self._pool.slots
        self._pool.clear([slot])
        with torch.no_grad(), batch_invariant(), unchecked():
            state = self._run_lanes([part] * self._lanes, [slot] * self._lanes)
        return all(bool((x == x[:1]).all()) for layer in state.layers for x in layer)


def _shares(jobs: list[Job], budget: int) -> list[tuple[Job, int]]:
    """Tokens for each of the first jobs; what a short prompt does not need goes to longer ones."""
    chosen = sorted(jobs[: min(READ_TOGETHER, budget)], key=lambda job: job.unread)
    shares = []
    for i, job in enumerate(chosen):
        size = min(job.unread, budget // (len(chosen) - i))
        budget -= size
        shares.append((job, size))
    return shares


def _to_next_mark(job: Job, size: int) -> int:
    ahead = [mark - job.position for mark in job.marks if mark > job.position]
    return min([size, *ahead])


def _expected(job: Job, piece: int) -> list[bytes]:
    """Names of the beginnings that `job` will have left in the cache when it is read."""
    return [job.names[mark // piece - 1] for mark in job.marks if mark > job.position]


def _waits(names: list[bytes], expected: set[bytes], cache: PrefixCache) -> bool:
    """Whether a longer beginning than any known one is on its way."""
    for name in reversed(names):
        if name in expected:
            return True
        if name in cache:
            return False
    return False
