"""A request under way inside the engine: where its prompt stands, and each of its samples."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import torch
from torch import Tensor

from rwkv7.generate import Session
from rwkv7.sampling import Sampler
from rwkv7.state import ModelState

from .output import Decode, Output
from .request import Completion, Event, Request


class Job:
    """One request. Read first, then run as samples; each has a slot from admission to its end.

    Attributes:
        prompt: int64 [T] on the CPU, the ids to read: all but the last, which is fed as a drawn one
            is.
        state: what reading begins from, on any device; None for the state before the first token.
        position: how many of `prompt` have been read; `begun` says whether its slot is set up.
        names: of the beginnings of `prompt` in the prefix cache; `marks`: positions whose state
            is to be kept there.
        events: what `Handle.stream` gives out, None at the end.
        done: set when every sample has ended.
    """

    def __init__(self, request: Request, state: ModelState | None, tokens: Tensor) -> None:
        self.request = request
        self.state = state
        self.prompt = tokens[:-1]
        self.position = 0
        self.begun = False
        self.names: list[bytes] = []
        self.marks: set[int] = set()
        self.samples: list[Sample] = []
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self.done = threading.Event()
        self.deadline: float | None = None

    @property
    def unread(self) -> int:
        """How many ids of the prompt are still to be read."""
        return len(self.prompt) - self.position

    @property
    def is_read(self) -> bool:
        """Whether the whole prompt has been read."""
        return self.begun and not self.unread

    @property
    def slot(self) -> int:
        """Where the prompt is read: the first sample's slot."""
        slot = self.samples[0].slot
        assert slot is not None
        return slot


class Sample:
    """One continuation of a job's prompt.

    Attributes:
        token: the last id, which is not part of its state yet.
        slot: its row of the pool; None before admission and after the end.
        drawn: how many ids were drawn.
        completion: how it ended, None while it runs.
    """

    def __init__(self, job: Job, index: int, token: int, sampler: Sampler, decode: Decode | None):
        self.job, self.index, self.token, self.sampler = job, index, token, sampler
        request = job.request
        state = request.state
        pending = state.pending if isinstance(state, Session) else b""
        stops = [text.encode() for text in request.stop_strings]
        self.output = Output(decode, request.stop_tokens, stops, pending)
        self.slot: int | None = None
        self.drawn = 0
        self.completion: Completion | None = None

    def end(self, reason: str, error: str | None = None, session: Session | None = None) -> Event:
        """Its last event; fills `completion`."""
        piece, output = self.output.finish(), self.output
        self.completion = Completion(
            tuple(output.tokens),
            "".join(output.text),
            tuple(output.logprobs),
            reason,
            error,
            session,
        )
        return Event(self.index, *piece, reason)


def tokens_of(request: Request, vocab_size: int) -> Tensor:
    """The ids of a request, int64 [T] on the CPU, the one its session has not fed in front.

    Raises:
        ValueError, TypeError: no ids, other things than ids, or ids outside the vocabulary.
    """
    given = request.tokens
    if not isinstance(given, Tensor):
        try:
            given = torch.tensor(given)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TypeError(f"tokens: expected ids, found something else ({error})") from None
        if not given.numel():
            given = given.long()
    if given.dim() != 1:
        raise ValueError(f"tokens: expected ids [T], found the shape {list(given.shape)}")
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise TypeError(f"tokens: expected whole numbers, found {given.dtype}")
    given = given.detach().to("cpu", torch.int64)
    state = request.state
    if isinstance(state, Session) and state.token is not None:
        given = torch.cat((torch.tensor([state.token]), given))
    if not given.numel():
        raise ValueError(
            "tokens: expected at least one id to start from, found none; a text that starts from "
            "nothing begins with the id that ends a document"
        )
    low, high = (int(x) for x in given.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"tokens: expected ids from 0 to {vocab_size - 1}, found {wrong}")
    return given
