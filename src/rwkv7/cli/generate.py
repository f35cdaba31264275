"""`rwkv7 generate`: continue a text, whole characters on stdout as they come."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rwkv7.files import check_destination
from rwkv7.generate import Session
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import StreamDecoder, Tokenizer, tokenizer_of

if TYPE_CHECKING:
    from rwkv7.nn import RWKV7


def generate(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint, or a folder that train wrote.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=0, help="How many tokens at most.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0: always the likeliest token. Default 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens. Default 0: from all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest that together reach p. Default 1."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens again.")] = None,
    state_in: Annotated[
        Path | None,
        typer.Option(help="A session to go on from, or a tuned state to begin with."),
    ] = None,
    state_out: Annotated[
        Path | None, typer.Option(help="Save the session here at the end, or at Ctrl-C.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda. Default: the best there is.")
    ] = None,
) -> None:
    """Continue a text with a trained model.

    The text goes to stdout as it comes and everything else to stderr. The likeliest tokens are
    chosen as RWKV does it: top-p first, then top-k, then temperature on what is left. A session
    saved with --state-out and continued with --state-in gives the text that one longer run would
    have given, wherever it was cut; it keeps its settings, which the options above replace.
    """
    if state_out is not None:
        check_destination(state_out)
    sampler = Sampler(
        1.0 if temperature is None else temperature,
        0 if top_k is None else top_k,
        1.0 if top_p is None else top_p,
        seed,
    )
    network = _load(model, device)
    tokenizer = tokenizer_of(network.config.vocab_size)
    session = Session(sampler)
    if state_in is not None:
        session = Session.load(state_in, network)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        session.sampler = _replaced(session.sampler, given)
    decoder = StreamDecoder(tokenizer, session.pending)
    _read(network, session, prompt, tokenizer, decoder)
    stopped = _write(network, session, tokens, tokenizer, decoder, final=state_out is None)
    if state_out is not None:
        session.pending = decoder.pending
        session.save(state_out, network)
        _say(f"session saved to {state_out}")
    if stopped:
        raise KeyboardInterrupt


def _load(path: Path, device: str | None) -> RWKV7:
    from rwkv7.machine import device_called
    from rwkv7.weights import load_model

    start = time.perf_counter()
    network = load_model(path, device=device_called(device)).eval()
    sizes = network.config
    _say(
        f"{path}: {sizes.layers} layers, width {sizes.width}, on {network.device} "
        f"({time.perf_counter() - start:.1f} s)"
    )
    return network


def _replaced(sampler: Sampler, given: dict[str, Any]) -> Sampler:
    """The session's sampler with the settings that were given; a new seed starts its draws."""
    state = sampler.state_dict()
    if given["seed"] is not None:
        state["draws"] = 0
    return Sampler.from_state_dict(state | {k: x for k, x in given.items() if x is not None})


def _read(
    network: RWKV7, session: Session, prompt: str, tokenizer: Tokenizer, decoder: StreamDecoder
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
    """Stream the text; whether Ctrl-C stopped it, which it does between two tokens."""
    stop = () if tokenizer.end_of_document is None else (tokenizer.end_of_document,)
    if session.ended:
        _say("the text had ended; give --prompt to go on after it")
    count, start = 0, time.perf_counter()
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that cannot show a character gets a question mark, not an error.
        sys.stdout.reconfigure(errors="replace")
    with _asked_to_stop() as asked:
        for token in session.run(network, tokens, stop):
            count += 1
            print(decoder.feed(token), end="", flush=True)
            if asked():
                break
        if final:
            print(decoder.flush(), end="", flush=True)
    seconds = time.perf_counter() - start
    _say(f"\n{count} tokens, {count / seconds:.1f} a second, seed {session.sampler.seed}")
    return asked()


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is only noted, so that the session stays whole; a second one interrupts."""
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
