"""What a caller holds of a request: its stream, its end, and its state as a thing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from queue import Empty
from typing import TYPE_CHECKING

from rwkv7.generate import Session
from rwkv7.sampling import Sampler

from .job import Job
from .request import Completion, Event, RequestFailed

if TYPE_CHECKING:
    from .engine import Engine

_PATIENCE = 0.1  # seconds between looks at whether the engine's thread still runs


class Handle:
    """A request that was submitted. When nobody holds it any more, the request is cancelled."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job
        leave = weakref.finalize(self, engine.abandon, job)
        leave.atexit = False

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return self._job.done.is_set()

    def stream(self) -> Iterator[Event]:
        """What becomes certain of the samples, as it comes; each event comes once.

        Advances the engine where no thread of its own does. Leaving the loop early cancels the
        request. A sample that fails ends with the finish reason "error".
        """
        try:
            while (event := self._next()) is not None:
                yield event
        finally:
            # Not `cancel`: an iterator may be closed by garbage collection, inside a step too.
            self._engine.abandon(self._job)

    def result(self) -> Completion:
        """The first sample's completion, when all have ended; RequestFailed where it failed."""
        first = self.results()[0]
        if first.finish_reason == "error":
            raise RequestFailed(first.error)
        return first

    def results(self) -> tuple[Completion, ...]:
        """All samples' completions, when all have ended; those that failed among them."""
        while not self.done:
            if self._engine.has_thread:
                self._job.done.wait(_PATIENCE)
            else:
                self._engine.step()
        return tuple(s.completion for s in self._job.samples if s.completion is not None)

    def cancel(self) -> None:
        """End what still runs, with the finish reason "cancelled", and free its slots."""
        self._engine.cancel(self._job)

    def mark(self, sample: int = 0) -> Session:
        """Where a sample stands, to go on from at any later time: to rewind to, to save, to fork.

        The engine is advanced until the prompt has been read. Submitted as `Request((), state=…)`,
        it goes on as this sample does. Shares no memory with the engine.

        Raises:
            ValueError: the sample has ended (`Request(keep=True)` keeps the last session), or there
                is none of this number.
        """
        if not 0 <= sample < len(self._job.samples):
            raise ValueError(f"sample: expected 0 to {len(self._job.samples) - 1}, found {sample}")
        while (session := self._engine.session_of(self._job, sample)) is None:
            if self._engine.has_thread:
                self._job.done.wait(_PATIENCE / 100)
            else:
                self._engine.step()
        return session

    def fork(self, sample: int = 0, sampler: Sampler | None = None) -> Handle:
        """A second text that goes on from where a sample stands; errors are those of `mark`.

        Args:
            sample: which one.
            sampler: None for one of the same settings and draws, which draws the same ids.
        """
        return self._engine.fork(self._job, sample, self.mark(sample), sampler)

    def _next(self) -> Event | None:
        while True:
            ended = self.done  # before the look: what comes after it is then not missed
            try:
                waits = self._engine.has_thread and not ended
                return self._job.events.get(waits, _PATIENCE if waits else None)
            except Empty:
                if ended:
                    return None
                if not self._engine.has_thread:
                    self._engine.step()
