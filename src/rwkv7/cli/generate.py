"""`rwkv7 generate`: continue a text, whole characters on stdout as they come."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rwkv7.files import check_destination
from rwkv7.generate import Session
from rwkv7.tokenizer import StreamDecoder, Tokenizer, tokenizer_of

from .sampler_options import NOTHING_GIVEN, SamplerOptions, with_sampler_options
from .terminal import DeviceName, TokenizerName, asked_to_stop, read_model, say, show_whatever_comes

if TYPE_CHECKING:
    from rwkv7.nn import RWKV7


@with_sampler_options
def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint, or a folder that train wrote.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Take it from a file, or with - from stdin, to its last byte as it is.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help="How many tokens at most.")] = 256,
    state_in: Annotated[
        Path | None,
        typer.Option(help="A session to go on from, or a tuned state to begin with."),
    ] = None,
    state_out: Annotated[
        Path | None, typer.Option(help="Save the session here at the end, or at Ctrl-C or SIGTERM.")
    ] = None,
    tokenizer: TokenizerName = None,
    device: DeviceName = None,
    options: SamplerOptions = NOTHING_GIVEN,
) -> None:
    """Continue a text with a trained model.

    The text goes to stdout as it comes and everything else to stderr. A session
    saved with --state-out and continued with --state-in gives the text that one longer run would
    have given, wherever it was cut; it keeps its settings, which the options above replace.
    """
    if state_out is not None:
        check_destination(state_out)
    options.sampler()  # a setting out of range is said before the model is read
    beginning = prompt if prompt_file is None else _prompt_in(prompt_file, prompt)
    network = read_model(model, device)
    text = tokenizer_of(network.config.vocab_size, tokenizer)
    if state_in is None:
        session = Session(options.sampler(text))
    else:
        session = Session.load(state_in, network)
        session.sampler = options.sampler(text, session.sampler)
    decoder = StreamDecoder(text, session.pending)
    _read(network, session, beginning, text, decoder)
    stopped = _write(network, session, tokens, text, decoder, final=state_out is None)
    if state_out is not None:
        session.pending = decoder.pending
        session.save(state_out, network)
        say(f"session saved to {state_out}")
    if stopped:
        raise KeyboardInterrupt


def _prompt_in(name: str, prompt: str) -> bytes:
    if prompt:
        raise ValueError("--prompt-file: expected no --prompt beside it, found both")
    if name != "-":
        return Path(name).read_bytes()
    if sys.stdin is None:
        raise ValueError("--prompt-file -: expected text on stdin, found it closed")
    return sys.stdin.buffer.read()


def _read(
    network: RWKV7,
    session: Session,
    prompt: str | bytes,
    tokenizer: Tokenizer,
    decoder: StreamDecoder,
) -> None:
    ids = tokenizer.encode(prompt)
    if not ids and session.token is None:
        # A text has to start from something: the end of the one before it, or a new line.
        end = tokenizer.end_of_document
        ids = tokenizer.encode("\n") if end is None else [end]
    session.feed(network, ids)
    # A prompt that stops inside a character is completed by what follows, and shown with it.
    for token in ids:
        decoder.feed(token)


def _write(
    network: RWKV7,
    session: Session,
    tokens: int,
    tokenizer: Tokenizer,
    decoder: StreamDecoder,
    final: bool,
) -> bool:
    """Stream the text; whether Ctrl-C or SIGTERM stopped it, between two tokens."""
    stop = () if tokenizer.end_of_document is None else (tokenizer.end_of_document,)
    if session.ended:
        say("the text had ended; give --prompt to go on after it")
    count, start = 0, time.perf_counter()
    show_whatever_comes()
    with asked_to_stop(by_others=True) as asked:
        for token in session.run(network, tokens, stop):
            count += 1
            print(decoder.feed(token), end="", flush=True)
            if asked():
                break
        if final:
            print(decoder.flush(), end="", flush=True)
    seconds = time.perf_counter() - start
    say(f"\n{count} tokens, {count / seconds:.1f} a second, seed {session.sampler.seed}")
    return asked()
