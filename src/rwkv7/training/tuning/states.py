"""State tuning: the WKV states that texts begin with are trained, the model itself is not.

Source: RWKV-LM's state tuning. Its files, `blocks.i.att.time_state` [H, V, K], are what
`rwkv7.state.save_tuned` writes; token shifts begin at zero, which the files have no place for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from rwkv7.nn import RWKV7
from rwkv7.state import LayerState, ModelState, load_tuned, save_tuned

from .base import Base
from .whole import Tuning

__all__ = ["InitialStates", "StateTuning"]

CHECKPOINT = "state.safetensors"


class InitialStates(nn.Module):
    """The initial WKV state of every layer, [H, V, K] in fp32 (fp64 for an fp64 model), zeros."""

    def __init__(self, model: RWKV7) -> None:
        super().__init__()
        zeros = ModelState.zeros(model.config, 1, model.dtype, model.device)
        self.layers = nn.ParameterList(nn.Parameter(layer.wkv[0]) for layer in zeros.layers)
        self._shifts = zeros.layers[0].time_shift  # [1, C]

    def forward(self, sequences: int) -> ModelState:
        """The state of so many sequences at their beginning, in the graph of the parameters."""
        shift = self._shifts.expand(sequences, -1)
        return ModelState(
            tuple(LayerState(x.expand(sequences, -1, -1, -1), shift, shift) for x in self.layers)
        )


class StateTuning(Tuning):
    """Only the initial states are trained. The model's parameters no longer require gradients."""

    def __init__(
        self, model: RWKV7, base: Base | None = None, checkpoint: Path | None = None
    ) -> None:
        """`checkpoint` is a folder that `save` wrote into; None begins with zeros."""
        super().__init__(model.requires_grad_(False), base)
        self.states = InitialStates(model)
        self.trained = self.states
        if checkpoint is not None:
            tuned = load_tuned(checkpoint / CHECKPOINT, model.config, model.dtype)
            with torch.no_grad():
                for parameter, layer in zip(self.states.layers, tuned.layers, strict=True):
                    parameter.copy_(layer.wkv[0])

    def initial(self, sequences: int) -> ModelState:
        """The trained states, the same for every sequence."""
        return self.states(sequences)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes state.safetensors, itself a file for other programs."""
        save_tuned(self.states(1), folder / CHECKPOINT)

    def export(self, path: Path) -> None:
        """Writes the states, in fp32, as `blocks.i.att.time_state`."""
        save_tuned(self.states(1), path)

    def finish(self, out: Path) -> list[Path]:
        """Writes state.pth and state.safetensors into the folder of the run."""
        paths = [out / "state.pth", out / "state.safetensors"]
        for path in paths:
            self.export(path)
        return paths
