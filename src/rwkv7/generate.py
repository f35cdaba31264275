"""Generation one token at a time, and sessions: what it takes to go on as if never stopped.

Knows token ids alone. Text, its characters and the screen are left to the caller, who may keep
the bytes of an unfinished character in the session.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .files import json_object, open_tensors, write_atomically
from .fingerprint import fingerprint
from .nn import RWKV7
from .sampling import Sampler
from .state import ModelState, load_tuned

_VERSION = 1  # of what a session file holds beside the state
# Tokens of a prompt read in one call; bounds the memory that a long prompt takes.
_PREFILL = 2048


def generate(
    model: RWKV7,
    tokens: Sequence[int],
    state: ModelState | None = None,
    sampler: Sampler | None = None,
    max_tokens: int = 256,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """The ids that follow `tokens`, as they are drawn; a `Session` to go on with is kept by `run`.

    Args:
        model: on any device; gradients are off while it runs.
        tokens: the prompt's ids, at least one.
        state: for one sequence (B = 1), what the model returned for the tokens before; None at the
            start. Never changed.
        sampler: None draws at temperature 1 with a seed of its own.
        max_tokens: how many ids at most.
        stop: ids that end the text; one that is drawn is the last to come.

    Raises:
        ValueError, TypeError: no tokens, ids outside the vocabulary, a state that does not fit.
    """
    session = Session(sampler or Sampler(), state)
    session.feed(model, tokens)
    yield from session.run(model, max_tokens, stop)


@dataclass(slots=True)
class Session:
    """A text under way: what `rwkv7 generate --state-out` writes and `--state-in` reads.

    Every id but the last has been through the model; the last, `token`, is fed when the next one
    is wanted. Cut anywhere, saved, loaded and run on, a session gives the ids of an uncut run.
    """

    sampler: Sampler
    state: ModelState | None = None  # B = 1; None before the first token
    token: int | None = None  # None before the first token
    ended: bool = False  # whether `token` was drawn and ends the text
    pending: bytes = b""  # the bytes of a character not yet whole; the caller's, kept as given
    weights: str | None = None  # the fingerprint of the model it belongs to, where that is known

    @torch.no_grad()
    def feed(self, model: RWKV7, tokens: Sequence[int]) -> None:
        """Append `tokens`, ids that were not drawn: a prompt. An ended text goes on with them."""
        _check_ids(model, tokens)
        unfed = [*([] if self.token is None else [self.token]), *tokens]
        if not unfed:
            return
        # The last one waits even here, so that a cut before the first draw is a cut like any.
        *unfed, token = unfed
        state = self.state
        for start in range(0, len(unfed), _PREFILL):
            piece = torch.tensor([unfed[start : start + _PREFILL]], device=model.device)
            _, state = model(piece, state, last_only=True)
        self.state, self.token, self.ended = state, token, self.ended and not tokens

    @torch.no_grad()
    def run(self, model: RWKV7, max_tokens: int, stop: Collection[int] = ()) -> Iterator[int]:
        """Draw up to `max_tokens` ids, each given as soon as it is drawn; fewer at a stop id.

        Between two of them the session is whole and may be saved. ValueError where there is no
        token to start from.
        """
        if self.token is None:
            raise ValueError("tokens: expected a prompt to start from, found none")
        for _ in range(max_tokens):
            if self.ended:
                return
            fed = torch.tensor([[self.token]], device=model.device)
            logits, state = model(fed, self.state, last_only=True)
            token = self.sampler.sample(logits[0, -1])
            self.state, self.token, self.ended = state, token, token in stop
            yield token

    def save(self, path: str | os.PathLike[str], model: RWKV7) -> None:
        """Write everything into one safetensors file, atomically; `model` is the one it ran on.

        Raises OSError (a full disk, a folder that is missing): an older file is then still whole.
        """
        state = self.state or ModelState.zeros(model.config, 1, model.dtype, "cpu")
        tensors, metadata = state.to_tensors(model.config)
        about = {
            "version": _VERSION,
            "token": self.token,
            "ended": self.ended,
            "pending": self.pending.hex(),
            "sampler": self.sampler.state_dict(),
            "weights": self.weights or fingerprint(model),
        }
        metadata["session"] = json.dumps(about)
        write_atomically(path, lambda file: save_file(tensors, file, metadata))

    @staticmethod
    def load(path: str | os.PathLike[str], model: RWKV7) -> Session:
        """Read what `save` wrote, for the same model, on its device. Nothing in it is executed.

        A file of `ModelState.save` will do too: a text that has a past, and starts with a prompt.
        So will a tuned state of the community, .pth or .safetensors, with which a text begins.

        Raises:
            ValueError: not a session, a broken one, or one of another model; says what differs.
            OSError: the file is missing or unreadable.
        """
        path = Path(path)
        path.open("rb").close()  # a missing or unreadable file is an OSError, whoever reads it
        try:
            with open_tensors(path) as file:
                tensors, metadata = dict(file), dict(file.metadata)
        except ValueError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise ValueError(f"{path}: not a session, or a truncated one ({reason})") from None
        if any(name.endswith(".att.time_state") for name in tensors):
            return _tuned(path, model)
        try:
            state = _placed(ModelState.from_tensors(tensors, metadata, model.config), model)
            if "session" not in metadata:
                return Session(Sampler(), state)
            return _restored(metadata["session"], state, model)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None


def _check_ids(model: RWKV7, tokens: Sequence[int]) -> None:
    V = model.config.vocab_size
    if wrong := [token for token in tokens if not 0 <= token < V]:
        raise ValueError(f"tokens: expected ids from 0 to {V - 1}, found {wrong[0]}")


def _tuned(path: Path, model: RWKV7) -> Session:
    return Session(Sampler(), _placed(load_tuned(path, model.config, model.dtype), model))


def _placed(state: ModelState, model: RWKV7) -> ModelState:
    if any(not bool(x.isfinite().all()) for layer in state.layers for x in layer):
        raise ValueError("a broken session: its state holds what is not a number")
    state = state.to(device=model.device, dtype=model.dtype)
    state.check(model.config, 1, model.dtype, model.device)
    return state


def _restored(text: str, state: ModelState, model: RWKV7) -> Session:
    try:
        about = json_object(text)
    except ValueError:
        raise ValueError("a broken session: its own part cannot be read") from None
    if about.get("version") != _VERSION:
        raise ValueError(
            f"a session of version {about.get('version')!r}; this library reads {_VERSION}"
        )
    weights = fingerprint(model)
    if about.get("weights") != weights:
        raise ValueError("the session belongs to other weights of the same sizes as this model's")
    token, ended, sampler = about.get("token"), about.get("ended"), about.get("sampler")
    if not isinstance(ended, bool) or type(token) not in (int, type(None)):
        raise ValueError("a broken session: its token cannot be read")
    if not isinstance(sampler, dict):
        raise ValueError("a broken session: its sampler cannot be read")
    try:
        pending = bytes.fromhex(about.get("pending", ""))
    except (TypeError, ValueError):
        raise ValueError("a broken session: its pending bytes cannot be read") from None
    _check_ids(model, [] if token is None else [token])
    return Session(Sampler.from_state_dict(sampler), state, token, ended, pending, weights)
