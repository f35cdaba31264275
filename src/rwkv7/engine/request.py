"""What goes into an engine and what comes out: requests, events and completions.

Plain data, checked where it is made; what happens to it is the engine's affair.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from rwkv7.generate import Session
from rwkv7.sampling import Sampler
from rwkv7.state import ModelState


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, and how it is to go on. ValueError or TypeError names a field that cannot be.

    Attributes:
        tokens: the prompt's ids; at least one, unless `state` is a session with a token not yet
            fed.
        max_tokens: how many ids at most; 0 only reads the prompt.
        sampler: None draws at temperature 1 with a seed of its own, or as the session did. Never
            changed.
        stop_tokens: ids that end the text. The one drawn is the last to come; its text is not.
        stop_strings: texts that end it, for engines that were given `decode`. Neither they nor a
            part of one is ever given out.
        logprobs: None for no log-probabilities; 0 for those of the drawn ids; k for those of the
            k likeliest as well.
        n: samples from one reading of the prompt; sample i has the sampler's seed plus i.
        timeout: seconds from submission after which what has come so far is all.
        state: what to go on from: a state of one sequence (a tuned one for instance), or a session,
            whose token not yet fed goes before `tokens`. Never changed.
        keep: whether each completion shall hold a session to go on from.
    """

    tokens: Sequence[int] | Tensor = field(kw_only=False)
    max_tokens: int = 256
    sampler: Sampler | None = None
    stop_tokens: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    logprobs: int | None = None
    n: int = 1
    timeout: float | None = None
    state: ModelState | Session | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 0), ("n", 1), ("logprobs", 0)):
            if name != "logprobs" or self.logprobs is not None:
                check_count(name, getattr(self, name), least)
        _check_stops(self.stop_tokens, self.stop_strings)
        if self.timeout is not None:
            if not isinstance(self.timeout, (int, float)) or isinstance(self.timeout, bool):
                raise TypeError(f"timeout: expected seconds, found {self.timeout!r}")
            if not (math.isfinite(self.timeout) and self.timeout >= 0):
                raise ValueError(f"timeout: expected seconds of at least 0, found {self.timeout}")


def check_count(name: str, value: object, least: int) -> None:
    """TypeError unless `value` is an int, ValueError unless it is at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, found {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, found {value}")


def _check_stops(tokens: Collection[int], strings: Sequence[str]) -> None:
    if isinstance(tokens, str) or not isinstance(tokens, Collection):
        raise TypeError(f"stop_tokens: expected a collection of ids, found {tokens!r}")
    for token in tokens:
        if not hasattr(token, "__index__") or isinstance(token, bool):
            raise TypeError(f"stop_tokens: expected ids, found {token!r}")
    if isinstance(strings, str):
        raise TypeError("stop_strings: expected a list of texts, found one text")
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) for text in strings):
        raise TypeError(f"stop_strings: expected a list of texts, found {strings!r}")
    if not all(strings):
        raise ValueError("stop_strings: expected texts, found an empty one")
    for text in strings:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"stop_strings: expected whole characters, found {text!r}")


class Logprob(NamedTuple):
    """The log-probability of a drawn id, natural logarithm, before any sampler setting."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]  # (id, log-probability), the most probable first


class Event(NamedTuple):
    """What has become certain of a sample since the event before."""

    sample: int  # 0 to n - 1
    tokens: tuple[int, ...]
    text: str  # whole characters; empty unless the engine was given `decode`
    logprobs: tuple[Logprob, ...]
    finish_reason: str | None  # on a sample's last event, see `Completion`


@dataclass(frozen=True, slots=True)
class Completion:
    """All of one sample.

    Attributes:
        finish_reason: "stop" (a stop token or string), "length" (max_tokens), "cancelled",
            "timeout" or "error".
        error: what went wrong, for "error".
        session: what to go on from, where `keep` asked for it; it has read all that was drawn, a
            stop string included.
    """

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...]
    finish_reason: str
    error: str | None = None
    session: Session | None = None


class RequestFailed(RuntimeError):
    """A request ended with the finish reason "error"; the others beside it are unharmed."""
