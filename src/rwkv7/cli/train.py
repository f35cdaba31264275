"""`rwkv7 train`: text in, a trained model in a folder. Every setting is an option of its name.

The options come from `TrainSettings`, so that there is one list of them. Only those given on the
command line are passed on; on --resume the others are what the run was begun with.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from rwkv7.training import (
    TrainingDivergedError,
    TrainResult,
    TrainSettings,
    console_report,
    resume_training,
    train_model,
)

__all__ = ["train"]


def _train(
    texts: list[Path] | None,
    out: Path,
    resume: bool,
    held_out_file: Path | None,
    device: str | None,
    given: dict[str, Any],
) -> None:
    """Train a model on text: files, and folders with all the text files in them.

    Files are read as bytes, UTF-8 or not; in folders hidden and binary files are left out. The end
    of the text is held out and never trained on. Ctrl-C finishes the step and saves; go on with
    --resume, for which OUT is enough.
    """
    report = console_report(Console())
    try:
        if resume:
            result = resume_training(
                out,
                given,
                texts or (),
                held_out_file=held_out_file,
                device=device,
                report=report,
            )
        else:
            result = train_model(
                TrainSettings(**given),
                texts or (),
                out,
                held_out_file=held_out_file,
                device=device,
                report=report,
            )
    except TrainingDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    _tell(result, out)


def _tell(result: TrainResult, out: Path) -> None:
    if result.finished:
        print(f"done: {result.step:,} steps; the model is {result.checkpoint}")
    else:
        print(f"stopped after step {result.step:,}, saved in {result.checkpoint}")
        print(f"go on with: rwkv7 train --out {out} --resume")


def _with_settings(
    verb: Callable[[list[Path] | None, Path, bool, Path | None, str | None, dict[str, Any]], None],
) -> Callable[..., None]:
    """`verb` as typer wants to see it: with one option for each field of `TrainSettings`."""

    def _command(
        texts: list[Path] | None,
        out: Path,
        resume: bool,
        held_out_file: Path | None,
        device: str | None,
        **settings: Any,
    ) -> None:
        given = {name: value for name, value in settings.items() if value is not None}
        verb(texts, out, resume, held_out_file, device, given)

    types = typing.get_type_hints(TrainSettings)
    parameters = [
        _parameter("texts", list[Path] | None, typer.Argument(None, help="Files and folders.")),
        _parameter("out", Path, typer.Option(..., "--out", help="Folder of the run.")),
        _parameter(
            "resume", bool, typer.Option(False, "--resume", help="Go on with the run in OUT.")
        ),
        _parameter(
            "held_out_file",
            Path | None,
            typer.Option(None, help="Evaluate on this file instead of the text's end."),
        ),
        _parameter(
            "device",
            str | None,
            typer.Option(None, help='"cpu", "cuda", … (default: a GPU if there is one)'),
        ),
    ]
    for setting in fields(TrainSettings):
        shown = "" if setting.default is None else f" (default: {setting.default})"
        option = typer.Option(None, help=setting.metadata["help"] + shown, show_default=False)
        parameters.append(_parameter(setting.name, types[setting.name] | None, option))
    _command.__doc__ = verb.__doc__
    _command.__annotations__ = {p.name: p.annotation for p in parameters}
    _command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return _command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


train = _with_settings(_train)
