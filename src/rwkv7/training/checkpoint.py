"""Checkpoints of a training run: whole or not there at all, and enough to go on bit for bit.

RUN/checkpoints/step-00000123/ holds what was trained (of a whole model model.safetensors, official
names, fp32; else what tuning/ writes), optimizer.safetensors (Adam's moments by parameter name) and
training.json (settings, the step, what wrote it, the model that the run began from). No random
generator is saved because none is in use after the start: the windows of a step follow from the
seed and its number. Nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv7.files import json_object
from rwkv7.nn import RWKV7
from rwkv7.weights import load_model

from .optim import make_optimizer
from .settings import TrainSettings
from .tuning import Base, Tuning, make_tuning, reopen_base, weights_dtype

__all__ = [
    "Checkpoint",
    "in_order",
    "load_checkpoint",
    "newest_checkpoint",
    "newest_trouble",
    "save_checkpoint",
]

FORMAT = 1
KEPT = 2  # the newest, and one before it should the newest be damaged
MODEL, OPTIMIZER, TRAINING = "model.safetensors", "optimizer.safetensors", "training.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole checkpoint on disk: its folder, the steps done, and all that training.json says."""

    path: Path
    step: int
    settings: TrainSettings
    machine: dict[str, Any]
    base: Base | None


def save_checkpoint(
    run: Path,
    tuning: Tuning,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    step: int,
    written_by: dict[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint of `step` steps done and removes all but the newest two.

    It is written under another name, flushed to the disk and renamed, so that a kill or a full disk
    at any moment leaves the earlier ones whole. `written_by` says which `machine` made the steps,
    when it was another one than this. Returns its folder; raises OSError when it cannot
    be written.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover)
    partial.mkdir()
    try:
        tuning.save(partial, {"tokenizer": settings.tokenizer, "step": str(step)})
        save_file(_moments(optimizer), partial / OPTIMIZER)
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in written}
        training = {
            "format": FORMAT,
            "step": step,
            "tokenizer": settings.tokenizer,
            "settings": settings.to_dict(),
            "machine": written_by or machine(tuning.model),
            "base": tuning.base and tuning.base.to_dict(),
            "bytes": sizes,
        }
        (partial / TRAINING).write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
        for path in (*written, partial / TRAINING):
            _flush(path)
        if final.exists():  # left by an earlier run of the same step, perhaps damaged since
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{final}: the checkpoint could not be written ({_reason(error)}); "
            "the earlier ones are whole"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in sorted(_folders(run), reverse=True)[KEPT:]:
        shutil.rmtree(old[1], ignore_errors=True)
    return final


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of the run, or None. Damaged and unfinished ones do not count."""
    for step, path in sorted(_folders(run), reverse=True):
        with contextlib.suppress(*_UNUSABLE):
            return _opened(path, step)
    return None


def newest_trouble(run: Path) -> str | None:
    """What keeps the run's newest checkpoint from being used, in words; None where nothing does,
    or there is none."""
    newest = max(_folders(run), default=None)
    if newest is None:
        return None
    step, path = newest
    try:
        _opened(path, step)
    except KeyError as error:
        return f"{path.name} cannot be used: {TRAINING} does not say {error}"
    except _UNUSABLE as error:
        return f"{path.name} cannot be used: {_reason(error)}"
    return None


# What a wrong training.json raises depends on where it is wrong; none stops the search.
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def _opened(path: Path, step: int) -> Checkpoint:
    """The checkpoint in the folder; raises one of `_UNUSABLE` for one that is not to be used."""
    training = json_object((path / TRAINING).read_bytes())
    if training["format"] != FORMAT:
        raise ValueError(f"its format is {training['format']}, expected {FORMAT}")
    sizes, writer = dict(training["bytes"]), dict(training["machine"])
    if OPTIMIZER not in sizes or len(sizes) == 1:
        raise ValueError(f"{TRAINING} does not name the files of a checkpoint")
    for name, size in sizes.items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, expected {size}: it is damaged")
    try:
        settings = TrainSettings.from_dict(training["settings"])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"its settings are not those of this version of rwkv7 ({error}); the version that "
            "wrote them can go on"
        ) from error
    origin = training.get("base")
    base = None if origin is None else Base.from_dict(origin)
    return Checkpoint(path=path, step=step, settings=settings, machine=writer, base=base)


def load_checkpoint(
    checkpoint: Checkpoint, device: torch.device, elsewhere: Path | None = None
) -> tuple[Tuning, torch.optim.AdamW]:
    """What was trained (weights in fp32), in its model, and the optimizer as they were saved.

    A model that was only tuned is read from where the run found it, or from `elsewhere`.

    Raises ValueError when the files do not belong together, a moment is missing, or the model that
    was tuned is not there.
    """
    settings, base, dtype = checkpoint.settings, checkpoint.base, weights_dtype(checkpoint.settings)
    if settings.tune == "full":
        model = load_model(checkpoint.path / MODEL, device=device, dtype=dtype)
    elif base is None:
        raise ValueError(f"{checkpoint.path}: it does not say which model was tuned")
    else:
        model, base = reopen_base(base, device, dtype, elsewhere)
    tuning = make_tuning(settings, model, base, checkpoint.path)
    optimizer = make_optimizer(tuning.trained, settings)
    path = checkpoint.path / OPTIMIZER
    try:
        moments = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    begun = bool(moments)  # there are none before the first step, and then all of them
    states: dict[int, dict[str, Tensor]] = {}
    for index, (name, parameter) in enumerate(in_order(optimizer)):
        if begun:
            states[index] = _moments_of(name, parameter, moments, path)
    known = {f"{name}.{moment}" for name, _ in in_order(optimizer) for moment in MOMENTS}
    if unknown := sorted(moments.keys() - known):
        raise ValueError(f"{path}: unknown tensors {', '.join(unknown[:3])}")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return tuning, optimizer


def _moments_of(
    name: str, parameter: Tensor, moments: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    if missing := [moment for moment in MOMENTS if f"{name}.{moment}" not in moments]:
        raise ValueError(f"{path}: {name}.{missing[0]} is missing")
    found = {moment: moments[f"{name}.{moment}"] for moment in MOMENTS}
    for moment in MOMENTS[:2]:
        if found[moment].shape != parameter.shape:
            raise ValueError(
                f"{path}: {name}.{moment}: expected the shape {list(parameter.shape)}, "
                f"found {list(found[moment].shape)}"
            )
    return found


def machine(model: RWKV7) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same bit for bit."""
    return {
        "torch": torch.__version__,
        "device": model.emb.weight.device.type,
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if _grouped() else 1,
    }


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment].contiguous()
        for name, parameter in in_order(optimizer)
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def in_order(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Names and parameters in the order in which the optimizer numbers them."""
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["names"], group["params"], strict=True)
    ]


def _folders(run: Path) -> list[tuple[int, Path]]:
    folder = run / "checkpoints"
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return [(int(match[1]), path) for match, path in found if match]


def _flush(path: Path) -> None:
    if path.is_dir():
        # Makes the renaming survive a power cut; Windows neither can nor needs to.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = f"{Path(error.filename).name}: " if error.filename else ""
        return name + error.strerror
    return str(error)
