"""RWKV-7's optimizer: AdamW in three parameter groups, and the cosine schedule with warm-up.

Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp (src/model.py, src/trainer.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .settings import TrainSettings

__all__ = ["learning_rate", "make_optimizer", "parameter_groups", "set_learning_rate"]

BETAS = (0.9, 0.99)
EPS = 1e-18  # small on purpose: the step of a parameter whose gradient is tiny stays full
DECAY_BIAS_LR_SCALE = 2.0  # att.w0, the bias of the decay, learns twice as fast
WARMUP_START = 0.01  # share of the learning rate at step 0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The three groups, each with its "params", "names", "lr_scale" and "weight_decay".

    att.w0 learns at twice the rate and does not decay; matrices whose names hold ".weight" decay;
    everything else (norms, biases, mixing vectors, the low-rank matrices, r_k) does not. Which
    group a parameter is in follows its official name and shape alone.
    """
    named = list(model.named_parameters())
    bias = [(n, p) for n, p in named if "att.w0" in n]
    matrices = [(n, p) for n, p in named if _dimensions(p) >= 2 and ".weight" in n]
    taken = {n for n, _ in bias + matrices}
    rest = [(n, p) for n, p in named if n not in taken]
    groups = (
        (bias, DECAY_BIAS_LR_SCALE, 0.0),
        (matrices, 1.0, weight_decay),
        (rest, 1.0, 0.0),
    )
    return [
        {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "lr_scale": scale,
            "weight_decay": decay,
        }
        for members, scale, decay in groups
    ]


def _dimensions(parameter: nn.Parameter) -> int:
    return sum(size > 1 for size in parameter.shape)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in one fused pass over each group's tensors."""
    groups = parameter_groups(model, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, eps=EPS, fused=True)


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of the step (from 0): a cosine from lr to lr_final, after the warm-up."""
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    progress = min(1.0, max(0.0, progress))
    middle, swing = (settings.lr + settings.lr_final) / 2, (settings.lr - settings.lr_final) / 2
    rate = middle + swing * math.cos(math.pi * progress)
    if step < settings.warmup:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / settings.warmup
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group the rate times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
