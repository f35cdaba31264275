"""`rwkv7 chat`: a conversation in the terminal, or with lines from a file or a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Annotated

import typer

from rwkv7.chat import Chat, template_called
from rwkv7.cli import one_line
from rwkv7.generate import Session
from rwkv7.nn import RWKV7
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import Tokenizer, tokenizer_of

from .sampler_options import NOTHING_GIVEN, SamplerOptions, with_sampler_options
from .terminal import DeviceName, TokenizerName, asked_to_stop, read_model, say, show_whatever_comes

_SUFFIX = ".chat.safetensors"
_HELP = f"""\
/save NAME   keep the conversation in NAME{_SUFFIX}
/load NAME   go on with a kept one
/fork        go on with a copy; /back returns to this point
/back        return to where the last /fork was
/retry       another answer to the last message
/reset       begin anew
/help        show this
/quit        leave (or Ctrl-D); Ctrl-C stops an answer"""


@with_sampler_options
def chat(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint, or a folder that train wrote.")
    ],
    template: Annotated[
        str,
        typer.Option(
            help="plain: an answer is one paragraph. paragraphs: it may be several. "
            "think: the model is asked to think first. empty-think: a model that thinks is asked "
            "to answer at once."
        ),
    ] = "plain",
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 1024,
    load: Annotated[str | None, typer.Option(help="Begin with what /save kept as NAME.")] = None,
    tokenizer: TokenizerName = None,
    device: DeviceName = None,
    options: SamplerOptions = NOTHING_GIVEN,
) -> None:
    """Talk with a trained model.

    Every line is a message, or a command such as /help. Answers go to stdout as they come and
    everything else to stderr. By default they are drawn with top-p 0.85, presence 0.2, frequency
    0.2 and decay 0.996.
    """
    template_called(template)  # an unknown one is said before the model is read
    options.sampler()
    if sys.stdin is None:
        raise ValueError("chat: expected messages on stdin, found it closed")
    network = read_model(model, device)
    text = tokenizer_of(network.config.vocab_size, tokenizer)
    talk = _Talk(network, text, template, tokens, options)
    if load is not None:
        talk.load(_named("--load", load), options)
    show_whatever_comes()
    if sys.stdin.isatty():
        say("/help lists the commands")
    for line in _lines():
        if line.strip() == "/quit":
            break
        try:
            talk.take(line.strip())
        except (ValueError, OSError) as error:
            say(f"error: {one_line(error)}")


class _Talk:
    """The conversation on the screen, and those that /fork left behind."""

    _chat: Chat

    def __init__(
        self,
        model: RWKV7,
        tokenizer: Tokenizer,
        template: str,
        tokens: int,
        options: SamplerOptions,
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._tokens, self._options = tokens, options
        self._forks: list[Chat] = []
        self.reset()

    def take(self, line: str) -> None:
        """Answer a message, or do what a command says."""
        command, _, rest = line.partition(" ")
        if not line:
            return
        if not command.startswith("/"):
            self._show(self._chat.say(line, self._tokens))
        elif command in ("/save", "/load"):
            (self.save if command == "/save" else self.load)(_named(command, rest))
        elif command == "/retry":
            self._show(self._chat.retry(self._tokens))
        elif command == "/reset":
            self.reset()
        elif command == "/fork":
            self._forks.append(self._chat.fork())
            say(f"forked; /back returns here ({len(self._forks)} kept)")
        elif command == "/back":
            if not self._forks:
                raise ValueError("/back: expected a /fork before it, found none")
            self._chat = self._forks.pop()
            say("back where it was forked")
        elif command == "/help":
            say(_HELP)
        else:
            raise ValueError(f"{command}: no such command; /help lists those there are")

    def reset(self) -> None:
        """Begin a new conversation with the settings of the command line."""
        # Those of the `rwkv` package (PIPELINE_ARGS in rwkv/utils.py).
        usual = Sampler(top_p=0.85, presence=0.2, frequency=0.2, decay=0.996)
        self._begin(Session(self._options.sampler(self._tokenizer, usual)))

    def save(self, path: Path) -> None:
        """Keep the conversation."""
        self._chat.save(path)
        say(f"kept in {path}")

    def load(self, path: Path, options: SamplerOptions = NOTHING_GIVEN) -> None:
        """Go on with a kept conversation and its sampler, less what `options` replace."""
        session = Session.load(path, self._model)
        session.sampler = options.sampler(self._tokenizer, session.sampler)
        self._begin(session)

    def _begin(self, session: Session) -> None:
        self._chat = Chat(self._model, self._tokenizer, self._template, session)

    def _show(self, pieces: Generator[str, None, None]) -> None:
        start = time.perf_counter()
        with asked_to_stop() as asked, contextlib.closing(pieces):
            for piece in pieces:
                print(piece, end="", flush=True)
                if asked():
                    break
        seconds = time.perf_counter() - start
        print(flush=True)
        stopped = ", stopped" if asked() else ""
        say(f"{self._chat.drawn} tokens, {self._chat.drawn / seconds:.1f} a second{stopped}")


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line; Ctrl-C at the prompt drops the line."""
    # Bytes that are not UTF-8 reach the tokenizer as they are, as those of a command line do.
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and keys)
    while True:
        try:
            yield input("User: ")
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D leaves")


def _named(command: str, name: str) -> Path:
    if not name.strip():
        raise ValueError(f"{command}: expected a name after it, found none")
    return Path(name.strip() + _SUFFIX)
