"""A run in its folder: `train_model` begins one, `resume_training` goes on with it.

The folder holds data/ (tokens), checkpoints/, log.jsonl, loss.png, and a lock while at work. The
loop itself is in loop.py.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rwkv7.config import ModelConfig
from rwkv7.nn import RWKV7, initialise_
from rwkv7.tokenizer import get_tokenizer

from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    machine,
    newest_checkpoint,
    save_checkpoint,
)
from .data import TokenData, find_text, open_data, prepare_data, text_digest
from .lock import run_lock
from .loop import OnStep, Run, TrainResult
from .optim import make_optimizer
from .report import Report
from .settings import TrainSettings, resumed_settings

__all__ = ["choose_device", "resume_training", "train_model"]

_LEFTOVER = re.compile(
    r"lock|data|data/\.?(train\.bin|train\.idx|held_out\.bin|held_out\.idx|data\.json).*"
    r"|checkpoints|checkpoints/\..*\.partial"
)


def train_model(
    settings: TrainSettings,
    texts: Sequence[Path],
    out: Path,
    *,
    held_out_file: Path | None = None,
    device: str | torch.device | None = None,
    report: Report | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Trains a new model on the text of files and folders and leaves the run in the folder `out`.

    Args:
        settings: sizes, recipe and rhythm; a dtype of "auto" is bf16 on a GPU that has it.
        texts: text files, taken as bytes, and folders of them (see `find_text`).
        out: the folder of the run; made, and refused when something else is in it.
        held_out_file: text to evaluate on instead of the end of `texts`.
        device: None means a CUDA GPU if there is one, else the CPU.
        report: what shows the progress; None shows nothing.
        on_step: told of each step; when it returns True the run saves and stops, as on Ctrl-C.

    Raises:
        ValueError: unusable text, settings, device or folder, before anything is written.
        RunIsBusyError: another process is training in `out`.
        OSError: a file could not be written; earlier checkpoints are whole.
        TrainingDivergedError: NaN or infinity; the last good checkpoint stays.
    """
    device = choose_device(device)
    settings = _with_dtype(settings, device)
    tokenizer = get_tokenizer(settings.tokenizer)
    config = ModelConfig.from_sizes(
        vocab_size=tokenizer.vocab_size,
        width=settings.width,
        layers=settings.layers,
        head_size=settings.head_size,
    )
    text = find_text(texts, exclude=out)
    held_out_text = find_text([held_out_file]) if held_out_file else None
    with _new_run(out):
        data = prepare_data(text, out / "data", tokenizer, settings.held_out, held_out_text)
        model = RWKV7(config, dtype=torch.float32, device="meta").to_empty(device=device)
        initialise_(model, torch.Generator().manual_seed(settings.seed))
        optimizer = make_optimizer(model, settings)
        run = Run(out, settings, data, model, optimizer)
        # A checkpoint of no steps shows a full disk at once, and a kill always finds one.
        save_checkpoint(out, model, optimizer, settings, 0)
        return run.go_on(report or Report(), on_step)


def resume_training(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    texts: Sequence[Path] = (),
    *,
    held_out_file: Path | None = None,
    device: str | torch.device | None = None,
    report: Report | None = None,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Goes on with the run in `out` from its newest whole checkpoint, as if it had never stopped.

    Args:
        out: the folder that `train_model` wrote.
        changes: settings by name. Those of `FREE_ON_RESUME` may differ from the run's.
        texts: not needed, the run has its tokens; when given, they must be the text of the run.
        held_out_file, device, report, on_step: as for `train_model`.

    Raises what `train_model` raises; ValueError too when there is no checkpoint, when a change
    would make it another run, or when the text is not the same.
    """
    device = choose_device(device)
    report = report or Report()
    nothing = f"{out}: there is no whole checkpoint to go on from; begin a new run"
    if not out.is_dir():
        raise ValueError(nothing)
    with run_lock(out):
        checkpoint = newest_checkpoint(out)
        if checkpoint is None:
            raise ValueError(nothing)
        settings = resumed_settings(checkpoint.settings, changes or {})
        data = open_data(out / "data")
        if texts:
            _check_same_text(data, texts, held_out_file, out)
        model, optimizer = load_checkpoint(checkpoint, device)
        _note_differences(checkpoint, model, report)
        run = Run(out, settings, data, model, optimizer, checkpoint.step)
        return run.go_on(report, on_step)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to train on: the one asked for, else a CUDA GPU, else the CPU.

    Raises ValueError for one that torch does not know or this machine does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: this machine cannot use {str(device)!r}: {reason}") from error
    return found


def _with_dtype(settings: TrainSettings, device: torch.device) -> TrainSettings:
    if settings.dtype != "auto":
        return settings
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(settings, dtype="bf16" if able else "fp32")


@contextmanager
def _new_run(out: Path) -> Iterator[None]:
    """Holds the folder for a run that begins. One that fails at once leaves nothing behind."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, found the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(out):
            _check_free(out)
            try:
                yield
            except BaseException:
                if newest_checkpoint(out) is None:
                    for name in ("data", "checkpoints"):
                        shutil.rmtree(out / name, ignore_errors=True)
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # raised where something is in it
            out.rmdir()
        raise


def _check_free(out: Path) -> None:
    """Refuses a folder in which there is more than a start that was killed may have left."""
    if (checkpoint := newest_checkpoint(out)) is not None:
        raise ValueError(
            f"{out}: holds a run of {checkpoint.step} steps. Go on with it (--resume), or choose "
            "another folder"
        )
    found = [p for folder in (out, out / "data", out / "checkpoints") for p in folder.glob("*")]
    names = [p.relative_to(out).as_posix() for p in found]
    foreign = sorted(name for name in names if not _LEFTOVER.fullmatch(name))
    if foreign:
        raise ValueError(
            f"{out}: expected an empty or new folder for the run, found {', '.join(foreign[:3])}"
        )


def _check_same_text(
    data: TokenData, texts: Sequence[Path], held_out_file: Path | None, out: Path
) -> None:
    held_out_text = find_text([held_out_file]) if held_out_file else None
    if text_digest(find_text(texts, exclude=out), held_out_text) != data.info.sha256:
        raise ValueError(
            "text: this is not the text that the run was begun with. Leave it out to go on with "
            "the run's own copy, or begin a new run in another folder"
        )


def _note_differences(checkpoint: Checkpoint, model: RWKV7, report: Report) -> None:
    now = machine(model)
    changed = [
        f"{name} {was} then, {now[name]} now"
        for name, was in checkpoint.machine.items()
        if now.get(name) != was
    ]
    if changed:
        report.note(
            f"goes on from step {checkpoint.step}, though not bit for bit as without the stop: "
            + "; ".join(changed)
        )
