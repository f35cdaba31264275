"""`rwkv7 train`: text in, a trained model in a folder. Every setting is an option of its name.

The options come from `TrainSettings`, so that there is one list of them. Only those given on the
command line are passed on; on --resume the others are what the run was begun with.
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from rwkv7.training import (
    Report,
    TrainingDivergedError,
    TrainResult,
    TrainSettings,
    console_report,
    plan_training,
    resume_training,
    train_model,
    tune_model,
)
from rwkv7.training.data import BadRecords
from rwkv7.training.together.processes import LostProcessError, OtherProcessError, joined, launched

from . import MISTAKE, STOPPED, first_process, leave_quietly

__all__ = ["train"]

LAST_WORDS = 3.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What the command line says beside the settings; field names are the parameters'."""

    texts: list[Path] | None
    out: Path
    resume: bool
    base: Path | None
    save: Path | None
    held_out_file: Path | None
    device: str | None
    dry_run: bool


def _train(call: _Call, given: dict[str, Any]) -> None:
    """Train a model on text: files, and folders with all the text files in them.

    Files are read as bytes, UTF-8 or not; in folders hidden and binary files are left out. The end
    of the text is held out and never trained on. With --from a model that exists is trained on, all
    of it or what --tune names. Ctrl-C finishes the step and saves; go on with --resume, for which
    OUT is enough. On several cards: torchrun --nproc-per-node 2 -m rwkv7 train …
    """
    given = _settled(call, given)
    if launched():
        _train_among_others(call, given)
        return
    if "parallel" in given:
        raise ValueError(
            "parallel: is for several processes; start them with "
            "torchrun --nproc-per-node 2 -m rwkv7 train …"
        )
    if call.dry_run:
        _plan(call, given)
        return
    try:
        result = _run(call, given, console_report(Console()))
    except TrainingDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _tell(result, call.out)


def _settled(call: _Call, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given, with what follows from one that is given alone."""
    if call.held_out_file is not None and "held_out" in given:
        raise ValueError(
            f"held_out: expected nothing beside --held-out-file, found {given['held_out']}; "
            "leave one of them out"
        )
    if "lr" in given and not (call.resume or call.base):
        final = TrainSettings.__dataclass_fields__["lr_final"].default
        return {"lr_final": min(given["lr"], final), **given}
    return given


def _train_among_others(call: _Call, given: dict[str, Any]) -> None:
    """As one of the processes that torchrun started. What all of them know, the first one tells."""
    first = first_process()
    if call.dry_run:
        if first:
            _plan(call, given)
        return
    report = console_report(Console()) if first else Report()
    _take_time_to_tell()
    try:
        with contextlib.ExitStack() as stack:
            device = _device_among_others(call, given, stack)
            result = _run(replace(call, device=str(device)), given, report)
    except OtherProcessError:
        leave_quietly(1)
    except (TrainingDivergedError, LostProcessError) as error:
        if not first:
            leave_quietly(1)
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if first:
            raise
        leave_quietly(STOPPED)
    if first:
        _tell(result, call.out)


def _take_time_to_tell() -> None:
    """From now on SIGTERM ends this process in seconds, not at once: torchrun sends it as soon as
    another process has failed, which may be before this one has told of it."""

    def note(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, LAST_WORDS)

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGTERM, note)


def _device_among_others(
    call: _Call, given: dict[str, Any], stack: contextlib.ExitStack
) -> torch.device:
    try:
        if not (call.resume or call.base):
            TrainSettings(**given)
        return stack.enter_context(joined(call.device))
    except ValueError:  # every process finds the same
        if first_process():
            raise
        leave_quietly(MISTAKE)


def _plan(call: _Call, given: dict[str, Any]) -> None:
    if call.resume:
        raise ValueError("dry_run: tells of a run that begins; leave --resume out")
    plan = plan_training(
        given,
        call.texts or (),
        base=call.base,
        held_out_file=call.held_out_file,
        device=call.device,
    )
    print("\n".join(plan.lines()))


def _run(call: _Call, given: dict[str, Any], report: Report) -> TrainResult:
    texts, out, held_out_file = call.texts or (), call.out, call.held_out_file
    device, save = call.device, call.save
    if call.resume:
        return resume_training(
            out,
            given,
            texts,
            held_out_file=held_out_file,
            device=device,
            report=report,
            save=save,
            base=call.base,
        )
    if call.base is not None:
        return tune_model(
            call.base,
            given,
            texts,
            out,
            held_out_file=held_out_file,
            device=device,
            report=report,
            save=save,
        )
    return train_model(
        TrainSettings(**given),
        texts,
        out,
        held_out_file=held_out_file,
        device=device,
        report=report,
        save=save,
    )


def _tell(result: TrainResult, out: Path) -> None:
    if result.bad_records:
        print(BadRecords.in_words(result.bad_records))
    if result.finished:
        print(f"done: {result.step:,} steps; the model is {result.checkpoint}")
    else:
        print(f"stopped after step {result.step:,}, saved in {result.checkpoint}")
        print(f"go on with: rwkv7 train --out {out} --resume")


def _with_settings(verb: Callable[[_Call, dict[str, Any]], None]) -> Callable[..., None]:
    """`verb` as typer wants to see it: with one option for each field of `TrainSettings`."""
    names = {field.name for field in fields(_Call)}

    def _command(**given: Any) -> None:
        call = _Call(**{name: given.pop(name) for name in names})
        verb(call, {name: value for name, value in given.items() if value is not None})

    types = typing.get_type_hints(TrainSettings)
    parameters = [_parameter(*option) for option in _OPTIONS]
    for setting in fields(TrainSettings):
        shown = "" if setting.default is None else f" (default: {setting.default})"
        option = typer.Option(None, help=setting.metadata["help"] + shown, show_default=False)
        parameters.append(_parameter(setting.name, types[setting.name] | None, option))
    _command.__doc__ = verb.__doc__
    _command.__annotations__ = {p.name: p.annotation for p in parameters}
    _command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return _command


_OPTIONS: list[tuple[str, Any, Any]] = [
    ("texts", list[Path] | None, typer.Argument(None, help="Files and folders.")),
    ("out", Path, typer.Option(..., "--out", help="Folder of the run.")),
    ("resume", bool, typer.Option(False, "--resume", help="Go on with the run in OUT.")),
    (
        "base",
        Path | None,
        typer.Option(None, "--from", help="Begin with this checkpoint, or the run in this folder."),
    ),
    (
        "save",
        Path | None,
        typer.Option(
            None, help="Write the result here at the end: .pth or .safetensors, official names."
        ),
    ),
    (
        "held_out_file",
        Path | None,
        typer.Option(None, help="Evaluate on this file instead of the text's end."),
    ),
    (
        "dry_run",
        bool,
        typer.Option(
            False, "--dry-run", help="Print parameters, memory, tokens and time; write nothing."
        ),
    ),
    (
        "device",
        str | None,
        typer.Option(None, help='"cpu", "cuda", … (default: a GPU if there is one)'),
    ),
]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


train = _with_settings(_train)
