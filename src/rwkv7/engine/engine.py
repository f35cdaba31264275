"""`Engine`: many requests over one model, each as if it were alone.

Holds the requests that wait, those whose prompts are being read and the samples that run, and
decides who enters and leaves. Token ids alone: `decode`, given by the caller, makes text of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType

import torch

from rwkv7.fingerprint import fingerprint
from rwkv7.generate import Session
from rwkv7.nn import RWKV7
from rwkv7.sampling import Sampler
from rwkv7.state import ModelState

from .choose import choose
from .decoder import Decoder
from .handle import Handle
from .job import Job, Sample, tokens_of
from .output import Decode
from .pool import MemoryBudget, Pool, check_sizes, memory_budget
from .prefill import Prefill
from .prefix_cache import PrefixCache
from .request import Event, Logprob, Request


class Engine:
    """Runs requests of unequal length together; they enter and leave at any time.

    Every `step` reads a bounded part of the prompts that have a slot, then draws one id for each
    sample that runs. Requests that find no free slot wait, first come, first served. Memory is
    taken at the start (`budget` says how much). A request's logits are within rounding of those
    it gets alone.

    Args:
        model: gradients are off while it runs; its weights must not change meanwhile.
        slots: how many samples may run at once.
        max_prefill_tokens: how many tokens of prompts are read between two decoding steps.
        deterministic: the same ids and log-probabilities, bit for bit, whatever else runs, on one
            machine with the same `slots` and `max_prefill_tokens`; slower where few requests run.
        cuda_graphs: None captures decoding and reading where the model is on a GPU; False does not.
        cache: keeps states of prompts' beginnings, for requests without a state of their own.
        decode: the bytes of ids, such as a tokenizer's `decode_bytes`, for text and stop strings.
            A sample at whose id it fails ends with an error.

    Raises:
        ValueError, TypeError: fewer than one slot or token, or a cache of another model.
    """

    def __init__(
        self,
        model: RWKV7,
        *,
        slots: int = 16,
        max_prefill_tokens: int = 2048,
        deterministic: bool = False,
        cuda_graphs: bool | None = None,
        cache: PrefixCache | None = None,
        decode: Decode | None = None,
    ) -> None:
        check_sizes(slots, max_prefill_tokens)
        if cache is not None:
            cache.check(model)
        self._model, self._decode = model, decode
        self._weights = fingerprint(model)
        self.budget: MemoryBudget = memory_budget(
            model.config, slots, model.dtype, max_prefill_tokens
        )
        with torch.no_grad():
            self._pool = Pool(model.config, slots, model.dtype, model.device)
            graphs = cuda_graphs is not False
            self._decoder = Decoder(model, self._pool, deterministic, graphs)
            self._prefill = Prefill(
                model, self._pool, max_prefill_tokens, deterministic, cache, graphs
            )
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._running: list[Sample] = []
        self._abandoned: deque[Job] = deque()
        self._deadlines: list[tuple[float, int, weakref.ref[Job]]] = []
        self._numbers = itertools.count()
        self._turnstile = _Turnstile()
        self._thread: threading.Thread | None = None
        self._wake: SimpleQueue[None] = SimpleQueue()  # unlike other locks it may be used by a
        # finalizer that garbage collection runs inside that very lock
        self._stopping = False

    def submit(self, request: Request) -> Handle:
        """Queue a request; nothing of it is run here.

        Raises:
            ValueError, TypeError: no ids, ids outside the vocabulary, more samples than slots, stop
                strings without `decode`, a state that does not fit, is not finite, or belongs to
                another model, as a sampler may too.
        """
        if not isinstance(request, Request):
            raise TypeError(f"request: expected a Request, found {request!r:.60}")
        state, sampler = self._start_of(request)
        tokens = tokens_of(request, self._model.config.vocab_size)
        if request.n > self._pool.slots:
            raise ValueError(
                f"n: expected at most {self._pool.slots} samples, the engine's slots, "
                f"found {request.n}"
            )
        if request.stop_strings and self._decode is None:
            raise ValueError("stop_strings: this engine knows no text; give it decode=")
        job = Job(request, state, tokens)
        for index in range(request.n):
            own = _reseeded(sampler, index)
            job.samples.append(Sample(job, index, int(tokens[-1]), own, self._decode))
        handle = Handle(self, job)
        with self._turnstile:
            if request.timeout is not None:
                deadline = time.monotonic() + request.timeout
                heapq.heappush(self._deadlines, (deadline, next(self._numbers), weakref.ref(job)))
            self._waiting.append(job)
        self._wake_up()
        return handle

    @torch.no_grad()
    def step(self) -> bool:
        """Advance everything once; whether anything is left to do.

        An error of the machine (memory, a driver) ends every request that had a slot with the
        finish reason "error", and is raised.
        """
        with self._turnstile:
            self._leave()
            self._admit()
            try:
                self._read()
                self._draw()
            except BaseException as error:
                for sample in self._with_slots():
                    self._end(sample, "error", f"the engine failed: {error!r}")
                self._reading, self._running = [], []
                raise
            return bool(self._waiting or self._reading or self._running)

    def run_until_idle(self) -> None:
        """Step until every request has ended."""
        while self.step():
            pass

    def start(self) -> None:
        """Step in a thread of the engine's own from now on; `stop`, or `with engine:`, ends it."""
        if not self.has_thread:
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="rwkv7 engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; requests stay where they are."""
        self._stopping = True
        self._wake_up()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def has_thread(self) -> bool:
        """Whether a thread of its own steps it."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def free_slots(self) -> int:
        """How many slots nobody has."""
        return self._pool.free

    def cancel(self, job: Job) -> None:
        """What `Handle.cancel` does."""
        with self._turnstile:
            self._end_job(job, "cancelled")

    def abandon(self, job: Job) -> None:
        """Cancel at the next step. Unlike `cancel` it never waits: for garbage collection."""
        if not job.done.is_set():
            self._abandoned.append(job)
            self._wake_up()

    def session_of(self, job: Job, index: int) -> Session | None:
        """What `Handle.mark` gives, None while the prompt is being read."""
        with self._turnstile:
            sample = job.samples[index]
            if sample.completion is not None:
                raise ValueError(
                    f"sample: {index} has ended ({sample.completion.finish_reason}); "
                    "Request(keep=True) keeps a session to go on from"
                )
            return self._session(sample) if sample in self._running else None

    def fork(self, job: Job, index: int, session: Session, sampler: Sampler | None) -> Handle:
        """What `Handle.fork` does."""
        left = job.request.max_tokens - job.samples[index].drawn
        request = dataclasses.replace(
            job.request, tokens=(), state=session, sampler=sampler, n=1, max_tokens=max(0, left)
        )
        return self.submit(request)

    def _start_of(self, request: Request) -> tuple[ModelState | None, Sampler]:
        """The state that a request begins from, checked, and its sampler."""
        given, sampler = request.state, request.sampler
        if not isinstance(given, (ModelState, Session, type(None))):
            raise TypeError(f"state: expected a ModelState or a Session, found {given!r:.60}")
        if not isinstance(sampler, (Sampler, type(None))):
            raise TypeError(f"sampler: expected a Sampler, found {sampler!r:.60}")
        if isinstance(given, Session):
            if given.weights not in (None, self._weights):
                raise ValueError("state: the session belongs to other weights than this engine's")
            sampler = sampler or given.sampler
            given = given.state
        if given is not None:
            model = self._model
            if given.batch != 1:
                raise ValueError(f"state: expected one sequence, found {given.batch}; select one")
            given.to(model.device).check(model.config, 1, model.dtype, model.device)
            if any(not bool(x.isfinite().all()) for layer in given.layers for x in layer):
                raise ValueError("state: expected numbers, found NaN or infinities")
            given = given.clone()
        sampler = sampler or Sampler()
        sampler.check(self._model.config.vocab_size)
        return given, sampler

    def _leave(self) -> None:
        while self._abandoned:
            self._end_job(self._abandoned.popleft(), "cancelled")
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            if (job := heapq.heappop(self._deadlines)[2]()) is not None:
                self._end_job(job, "timeout")

    def _admit(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if not job.done.is_set():
                if job.request.n > self._pool.free:
                    return
                for sample in job.samples:
                    sample.slot = self._pool.take()
                self._reading.append(job)
            self._waiting.popleft()

    def _read(self) -> None:
        if not self._reading or not self._prefill.pays(self._reading, len(self._running)):
            return
        self._prefill.read(self._reading)
        for job in [job for job in self._reading if job.is_read]:
            self._reading.remove(job)
            slots = [sample.slot for sample in job.samples if sample.slot is not None]
            self._pool.copy(slots[0], slots[1:])
            for sample in job.samples:
                self._running.append(sample)
                if not job.request.max_tokens:
                    self._end(sample, "length")
        self._running = [sample for sample in self._running if sample.completion is None]

    def _draw(self) -> None:
        running = self._running
        if not running:
            return
        slots = [sample.slot for sample in running if sample.slot is not None]
        logits = self._decoder([sample.token for sample in running], slots)
        wanted = [sample.job.request.logprobs for sample in running]
        chosen = choose(logits, [sample.sampler for sample in running], wanted)
        for sample, (token, logprob, error) in zip(running, chosen, strict=True):
            if error is not None:
                self._end(sample, "error", error)
                continue
            try:
                self._take(sample, token, logprob)
            except Exception as failed:  # the caller's `decode` may raise whatever it likes
                self._end(sample, "error", f"decode failed on the id {token}: {failed!r}")
        self._running = [sample for sample in running if sample.completion is None]

    def _take(self, sample: Sample, token: int, logprob: Logprob | None) -> None:
        sample.token = token
        sample.drawn += 1
        piece = sample.output.take(token, logprob)
        if piece.tokens or piece.text:
            sample.job.events.put(Event(sample.index, *piece, None))
        if sample.output.stopped:
            self._end(sample, "stop")
        elif sample.drawn >= sample.job.request.max_tokens:
            self._end(sample, "length")

    def _end_job(self, job: Job, reason: str) -> None:
        for sample in job.samples:
            if sample.completion is None:
                self._end(sample, reason)
        self._running = [sample for sample in self._running if sample.completion is None]
        if job in self._reading:
            self._reading.remove(job)

    def _end(self, sample: Sample, reason: str, error: str | None = None) -> None:
        job, session = sample.job, None
        if job.request.keep and error is None and sample.slot is not None and job.is_read:
            session = self._session(sample, ended=reason == "stop")
        job.events.put(sample.end(reason, error, session))
        if sample.slot is not None:
            self._pool.give_back(sample.slot)
            sample.slot = None
        if all(other.completion is not None for other in job.samples):
            job.events.put(None)
            job.done.set()

    def _session(self, sample: Sample, ended: bool = False) -> Session:
        assert sample.slot is not None
        state = self._pool.read([sample.slot]).to("cpu")
        sampler = _reseeded(sample.sampler, 0)
        return Session(sampler, state, sample.token, ended, sample.output.pending, self._weights)

    def _with_slots(self) -> Iterator[Sample]:
        for sample in [*(s for job in self._reading for s in job.samples), *self._running]:
            if sample.completion is None:
                yield sample

    def _loop(self) -> None:
        while not self._stopping:
            busy = True
            # What failed has been told to the requests that failed; those that wait go on.
            with contextlib.suppress(Exception):
                busy = self.step()
            if not busy:
                self._wake.get()

    def _wake_up(self) -> None:
        if self._thread is not None:
            self._wake.put(None)


def _reseeded(sampler: Sampler, offset: int) -> Sampler:
    """A sampler of its own with the same settings and draws, the seed `offset` further."""
    about = sampler.state_dict()
    return Sampler.from_state_dict({**about, "seed": (int(about["seed"]) + offset) % 2**64})


class _Turnstile:
    """A lock that a thread which takes it again and again cannot keep from the others."""

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
