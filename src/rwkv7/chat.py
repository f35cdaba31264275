"""A conversation in the form that the official models were trained on, one turn at a time.

The past lives in a `Session`, so that no turn reads the ones before it again. The screen, the
keyboard and the names of files are left to the caller.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Generator
from dataclasses import dataclass

from .generate import Session
from .nn import RWKV7
from .sampling import Sampler
from .state import ModelState
from .tokenizer import StreamDecoder, Tokenizer
from .turns import END, ROLES

_USER = f"{END}{ROLES['user']}:"
_ASSISTANT = f"{END}{ROLES['assistant']}:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How an answer begins and where it ends; what is around it is the same for all.

    Source: the prompts of BlinkDL/RWKV-LM and of the RWKV7-G1 models, "User: …", an empty line,
    "Assistant:" without a space after it; a thinking model is started with " <think", and made to
    answer at once with a thought that is over ("fake think" on their model card, whose prompts
    leave the last ">" to the model).
    """

    opening: str  # written for the model, after "Assistant:"
    stop: str


TEMPLATES = {
    "plain": Template(opening="", stop=END),
    "paragraphs": Template(opening="", stop=_USER),
    "think": Template(opening=" <think", stop=_USER),
    "empty-think": Template(opening=" <think>\n</think", stop=_USER),
}


def template_called(name: str) -> Template:
    """The template of that name in `TEMPLATES`; ValueError where there is none."""
    if name not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise ValueError(f"template: expected one of {known}, found {name!r}")
    return TEMPLATES[name]


class Chat:
    """A conversation with `model`. Between two turns it can be saved, forked and gone on with.

    Args:
        model: on any device.
        tokenizer: the model's.
        template: a name in `TEMPLATES`.
        session: a new one, one that `save` wrote, or one with a state to begin from. Its sampler
            chooses the tokens, with the counts of one answer. The conversation makes it its own.

    Raises ValueError for an unknown template.
    """

    def __init__(self, model: RWKV7, tokenizer: Tokenizer, template: str, session: Session) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._name, self._template = template, template_called(template)
        self.session = session
        self.drawn = 0  # tokens of the last answer
        self._writing: Generator[str, None, None] | None = None
        # Where the last answer began: the state, and the token not yet fed to it.
        self._answered: tuple[ModelState | None, int | None] | None = None
        if session.token is None:
            self._feed(_USER.lstrip())

    def say(self, message: str, max_tokens: int) -> Generator[str, None, None]:
        """The answer to `message`, of at most `max_tokens`, piece by piece as it is drawn.

        A piece comes for every token, empty while a character or what may end the answer is not
        whole. `close` ends the answer early, as a new message does. The conversation is then as
        if the answer had ended there.

        Raises ValueError for a message with nothing in it.
        """
        # An empty line would end the message for the model.
        message = re.sub(r"\n\s*\n", "\n", message.strip())
        if not message:
            raise ValueError("message: expected some text, found none")
        self._stop_writing()
        self._feed(f" {message}{_ASSISTANT}{self._template.opening}")
        self._answered = self.session.state, self.session.token
        return self._begin(max_tokens)

    def retry(self, max_tokens: int) -> Generator[str, None, None]:
        """Another answer instead of the last one, from the same state, with new random numbers.

        Raises ValueError where there is none since the beginning or the file.
        """
        if self._answered is None:
            raise ValueError("retry: expected an answer before it, found none in this conversation")
        self._stop_writing()
        self.session.state, self.session.token = self._answered
        self.session.ended = False
        return self._begin(max_tokens)

    def fork(self) -> Chat:
        """A second conversation with the same past, and the same future if the same is said."""
        self._stop_writing()
        sampler = Sampler.from_state_dict(self.session.sampler.state_dict())
        session = dataclasses.replace(self.session, sampler=sampler)
        twin = Chat(self._model, self._tokenizer, self._name, session)
        twin._answered = self._answered
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as a session, atomically; OSError where `Session.save` does."""
        self._stop_writing()
        self.session.save(path, self._model)

    def _begin(self, max_tokens: int) -> Generator[str, None, None]:
        self.session.sampler.forget()
        self._writing = self._answer(max_tokens)
        next(self._writing)  # into its `try`: what is closed before it begins would not end well
        return self._writing

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.close()

    def _answer(self, max_tokens: int) -> Generator[str, None, None]:
        template, end = self._template, self._tokenizer.end_of_document
        decoder = StreamDecoder(self._tokenizer)
        held, tail, self.drawn = template.opening, "", 0
        drawn = self.session.run(self._model, max_tokens, () if end is None else (end,))
        try:
            yield ""
            for token in drawn:
                self.drawn += 1
                new = decoder.feed(token)
                held, tail = held + new, (tail + new)[-len(_USER) :]
                if template.stop in held:
                    yield held.partition(template.stop)[0]
                    return
                shown = len(held) - _overlap(held, template.stop)
                piece, held = held[:shown], held[shown:]
                yield piece
            yield held + decoder.flush()
        finally:
            # The next message follows at once, and a saved conversation holds all that it needs.
            there = 0 if self.session.ended or decoder.pending else _overlap(tail, _USER)
            self._feed(_USER[there:])

    def _feed(self, text: str) -> None:
        self.session.feed(self._model, self._tokenizer.encode(text))


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` begin `mark`."""
    sizes = range(min(len(text), len(mark)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)
