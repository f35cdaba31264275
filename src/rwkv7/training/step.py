"""The gradients of one step: what the loop, the search for a NaN and the dry run all compute.

Which batch, and what is done with the gradients, is left to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Batch
from .carry import batch_gradients
from .settings import TrainSettings
from .tuning import Tuning

__all__ = ["precision", "step_gradients"]


def step_gradients(
    tuning: Tuning, batch: Batch, settings: TrainSettings, denominator: float | None = None
) -> Tensor:
    """Adds the gradients of the batch's mean loss to `.grad` and returns the loss, in nats.

    Args:
        denominator: what the sum over predicted tokens is divided by; None means their number.
    """
    model = tuning.model
    model.train()
    # A packed row holds the tokens of the whole batch, so its windows do too.
    rows = 1 if batch.cu_seqlens is None else settings.batch
    with precision(settings, model.device):
        return batch_gradients(
            model,
            batch,
            mode=settings.carry,
            window=settings.window * rows,
            parts=settings.accumulate,
            state=tuning.initial(batch.sequences),
            denominator=denominator,
        )


def precision(settings: TrainSettings, device: torch.device) -> torch.autocast:
    """Products in bf16 where asked for; weights, state and moments stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16")
