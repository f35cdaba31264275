"""What the verbs that write text share: a model read with a word about it, Ctrl-C, stderr."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from rwkv7.machine import device_called
from rwkv7.nn import RWKV7
from rwkv7.weights import load_model

DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="Such as cpu or cuda. Default: the best there is."),
]

# The option of every verb that turns a model's ids into text.
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="byte, world, or the path of a tokenizer.json. Default: by the size of the model's "
        "vocabulary.",
    ),
]


def read_model(path: Path, device: str | None) -> RWKV7:
    """The model at `path`, on the device named or the best there is, told about on stderr."""
    start = time.perf_counter()
    network = load_model(path, device=device_called(device)).eval()
    sizes = network.config
    say(
        f"{path}: {sizes.layers} layers, width {sizes.width}, on {network.device} "
        f"({time.perf_counter() - start:.1f} s)"
    )
    return network


def check_together(needed: str, value: object, others: Mapping[str, object]) -> None:
    """ValueError for an option in `others`, by argument name, that is given without `needed`."""
    if value is not None:
        return
    for name, given in others.items():
        if given is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: expected {needed} beside it, found none")


@contextlib.contextmanager
def asked_to_stop(by_others: bool = False) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is only noted, so that the session stays whole; a second one interrupts.

    So is SIGTERM, if `by_others`: what a machine that shuts down, or a batch system, sends.
    """
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    names = ("SIGINT", "SIGTERM") if by_others else ("SIGINT",)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda: noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def show_whatever_comes() -> None:
    """Have a terminal that cannot show a character print a question mark, not an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def say(line: str) -> None:
    """Print a line to stderr, which keeps stdout for the model's text."""
    print(line, file=sys.stderr, flush=True)
