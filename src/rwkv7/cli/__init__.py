"""The command `rwkv7`: which verbs there are, and how mistakes end.

A verb is one file here, holding one function of its name (or, for a verb of several, a dictionary
of them); it is imported when it is asked for.
What a verb does is the library's affair: these files read arguments and show results.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import torch
import typer

__all__ = ["first_process", "leave_quietly", "main", "printable"]

# Each verb's file and function bear its name; a verb whose file is missing is not listed.
_VERBS = {
    "demo": "The whole story in minutes: verify, train, generate, save, go on.",
    "verify": "Check every backend here against the recurrence in float64.",
    "data": "Tokenize text into a corpus, or look into one.",
    "train": "Train a model on text.",
    "generate": "Continue a text with a trained model.",
    "chat": "Talk with a trained model.",
    "eval": "Measure a model on texts and tests in files.",
    "convert": "Write a checkpoint in another format, bit for bit.",
    "inspect": "Say what a checkpoint, a state or another file is.",
    "bench": "Time the operator's backends side by side.",
    "doctor": "Say what this machine can run.",
}

USER_MISTAKES = (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError)
NO_MEMORY = "DefaultCPUAllocator"  # torch's error for it has no type of its own on a CPU
MISTAKE = 2
STOPPED = 130  # what a shell reports for a program that Ctrl-C ended
GRACE = 10.0  # seconds that the first process has to tell of a mistake
PIPE_CLOSED = 141  # and for one whose reader went away


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (`sys.argv` when `arguments` is None) and exit.

    Exit codes: 0 done; 1 a verb's own "no" (`verify`); 2 a mistake in the call, told in one line
    on stderr; 130 stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = _app(given)
    if first_process():
        app(args=given, prog_name="rwkv7")
    try:
        code = app(args=given, prog_name="rwkv7", standalone_mode=False)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        leave_quietly(code)  # a mistake in the call
    sys.exit(code)


def leave_quietly(code: int) -> NoReturn:
    """Exits after the first process, which has told why. torchrun ends the others as soon as one
    has failed, so that one without a word must not be the first to go."""
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE)
    sys.exit(code)


def first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """`text` without what could move a terminal's cursor: files name their tensors as they like."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _app(arguments: Sequence[str]) -> typer.Typer:
    """The application for this call: the verb that it names, and the others for `--help` alone."""
    app = typer.Typer(
        help="RWKV-7 for PyTorch with state you can trust.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    developer = False

    @app.callback()
    def options(
        version: Annotated[
            bool,
            typer.Option("--version", is_eager=True, callback=_version, help="Say it and exit."),
        ] = False,
        traceback: Annotated[
            bool, typer.Option("--traceback", help="Show where an error arose, for developers.")
        ] = False,
    ) -> None:
        nonlocal developer
        developer = traceback

    for verb, line in _VERBS.items():
        if verb == wanted and _exists(verb):
            found = getattr(importlib.import_module(f"{__name__}.{verb}"), verb)
            functions, inside = {verb: found}, app
            if isinstance(found, dict):
                functions, inside = found, typer.Typer(no_args_is_help=True)
                app.add_typer(inside, name=verb, help=line)
            for name, function in functions.items():
                inside.command(name)(_ending_well(function, lambda: developer))
        elif _exists(verb):
            app.command(verb, help=line)(_unused)
    return app


def _exists(verb: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{verb}") is not None


def _unused() -> None:
    """Stands for a verb in the list that `--help` shows."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rwkv7 {importlib.metadata.version('rwkv7')} (torch {torch.__version__})")
        raise typer.Exit()


def _ending_well(function: Callable[..., Any], developer: Callable[[], bool]) -> Callable[..., Any]:
    """`function` whose mistakes of the user, and Ctrl-C, end in one line and an exit code."""

    @functools.wraps(function)
    def _guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            # Python would complain once more when it flushes stdout on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
        except USER_MISTAKES as error:
            if developer():
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(MISTAKE) from None
        except RuntimeError as error:
            if developer() or NO_MEMORY not in str(error):
                raise
            asked = re.search(r"allocate (\d+) bytes", str(error))
            size = f" for {int(asked[1]):,} bytes" if asked else ""
            print(f"error: memory: there is no room{size} on the CPU", file=sys.stderr)
            raise typer.Exit(MISTAKE) from None

    return _guarded


def one_line(error: BaseException) -> str:
    """What an error says, as a verb tells it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return printable(" ".join(str(error).split())) or type(error).__name__
