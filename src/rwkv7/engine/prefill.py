"""Reading prompts between decoding steps: in bounded pieces, and from the prefix cache.

Which prompts are read, and what becomes of them afterwards, is the engine's affair.
"""

from __future__ import annotations

from rwkv7.nn import RWKV7

from .job import Job
from .pool import PIECE, Pool
from .prefix_cache import PrefixCache
from .reader import Reader

# New prompts wait until they are one for so many samples that run, or for so many steps.
ENOUGH, PATIENCE = 8, 16


class Prefill:
    """Advances prompts in their slots of a pool.

    Args:
        model: on the device of the pool.
        pool: holds the state of each prompt between pieces.
        max_tokens: how many tokens one call of `read` may work through.
        deterministic: prompts are read in pieces that their own lengths decide, in lanes.
        cache: None keeps no states.
        graphs: see `Reader`.
    """

    def __init__(
        self,
        model: RWKV7,
        pool: Pool,
        max_tokens: int,
        deterministic: bool,
        cache: PrefixCache | None,
        graphs: bool = False,
    ) -> None:
        self._pool, self._cache = pool, cache
        self._max_tokens = max_tokens
        self._deterministic = deterministic
        self._piece = min(PIECE, max_tokens)
        lane = self._piece if deterministic else None
        self._reader = Reader(model, pool, max_tokens, lane, graphs)
        self._turn = 0  # whose it is, so that no prompt waits until a long one is read
        self._waited = 0  # steps, for others to be read with

    def pays(self, jobs: list[Job], running: int) -> bool:
        """Whether to read now, or to wait for more prompts while so many samples run.

        A call for one prompt takes about as long as one for several, and those that run stand
        still. What has begun goes on, and nothing waits for more than PATIENCE steps.
        """
        few = min(self._reader.most, running // ENOUGH)
        unread = sum(job.unread for job in jobs)
        waits = len(jobs) < few and 2 * unread < self._max_tokens and self._waited < PATIENCE
        if waits and not any(job.begun for job in jobs):
            self._waited += 1
            return False
        self._waited = 0
        return True

    def read(self, jobs: list[Job]) -> None:
        """Read up to `max_tokens` more of the prompts of `jobs`, which share them fairly."""
        self._begin([job for job in jobs if not job.begun], jobs)
        unread = [job for job in jobs if job.begun and job.unread]
        if not unread:
            return
        turn = self._turn % len(unread)
        unread = unread[turn:] + unread[:turn]
        most = self._reader.most
        self._turn += most if len(unread) > most else 0
        chosen = unread[:most]
        if self._deterministic:
            self._advance([(job, min(self._piece, job.unread)) for job in chosen])
        else:
            shares = _shares(chosen, self._max_tokens)
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

    def _advance(self, pieces: list[tuple[Job, int]]) -> None:
        slots = [job.slot for job, _ in pieces]
        parts = [job.prompt[job.position : job.position + size] for job, size in pieces]
        self._reader(parts, slots)
        for job, size in pieces:
            job.position += size
            if job.position in job.marks and self._cache is not None:
                name = job.names[job.position // self._piece - 1]
                if name not in self._cache:
                    self._cache.put(name, self._pool.read([job.slot]))


def _shares(jobs: list[Job], budget: int) -> list[tuple[Job, int]]:
    """Tokens for each job; what a short prompt does not need goes to longer ones."""
    chosen = sorted(jobs, key=lambda job: job.unread)
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
