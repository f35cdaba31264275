"""What of a model a run trains: all of it, the states that texts begin with, or adapters."""

from __future__ import annotations

from pathlib import Path

import torch

from rwkv7.nn import RWKV7
from rwkv7.training.settings import TrainSettings

from .base import Base, open_base, reopen_base
from .states import StateTuning
from .whole import Tuning

__all__ = ["Base", "Tuning", "make_tuning", "open_base", "reopen_base", "weights_dtype"]


def make_tuning(
    settings: TrainSettings, model: RWKV7, base: Base | None, checkpoint: Path | None = None
) -> Tuning:
    """The tuning that `settings.tune` names, at its start or as the folder `checkpoint` has it.

    Raises ValueError where "lora" is asked for and its package is not installed.
    """
    if settings.tune == "state":
        return StateTuning(model, base, checkpoint)
    if settings.tune == "lora":
        from .adapters import AdapterTuning  # loads peft, which takes seconds

        return AdapterTuning(model, base, settings, checkpoint)
    return Tuning(model, base)


def weights_dtype(settings: TrainSettings) -> torch.dtype:
    """The dtype of the model's weights in memory: fp32, but for frozen ones of a bf16 run."""
    frozen = settings.tune != "full" and settings.dtype == "bf16"
    return torch.bfloat16 if frozen else torch.float32
