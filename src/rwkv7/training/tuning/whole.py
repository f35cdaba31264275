"""`Tuning`: what of a model a run trains, with what texts begin, and which files keep it.

The class itself trains the whole model; states.py and adapters.py train less. How a step is made
and when something is saved is left to the loop and to checkpoint.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from rwkv7.nn import RWKV7
from rwkv7.state import ModelState
from rwkv7.weights import save_model

from .base import Base

__all__ = ["Tuning"]


class Tuning:
    """Every parameter of the model is trained.

    Attributes:
        model: what computes; on the device of the run.
        trained: the module whose parameters the optimizer changes, those that require gradients.
        base: where the run began; None for a new model.
    """

    def __init__(self, model: RWKV7, base: Base | None = None) -> None:
        self.model, self.base = model, base
        self.trained: nn.Module = model

    def initial(self, sequences: int) -> ModelState | None:
        """The state with which so many texts begin, to be given to the model; None means zeros."""
        return None

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes what was trained into a checkpoint's folder, files that nothing else uses."""
        save_model(self.model, folder / "model.safetensors", metadata)

    def export(self, path: Path) -> None:
        """Writes the result for other programs: .pth or .safetensors, official names.

        Weights are written in the dtype that the base's had; those of a new model in fp32.
        """
        dtype = torch.float32 if self.base is None else self.base.torch_dtype
        model = self.model
        save_model(model if model.dtype == dtype else copy.deepcopy(model).to(dtype), path)

    def finish(self, out: Path) -> list[Path]:
        """Leaves the result of a finished run in its folder, where a checkpoint will not do."""
        return []
