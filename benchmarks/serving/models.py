"""What the parts share: models of random weights, and how long one of their steps takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rwkv7 import RWKV7, ModelConfig
from rwkv7.benchmark.clock import seconds
from rwkv7.engine.decoder import Decoder
from rwkv7.engine.pool import Pool

Figures = dict[str, dict[str, Any]]
# One after the other, so that each can be kept before the next one is measured.
Parts = Iterator[tuple[str, dict[str, Any]]]
TINY = ModelConfig.from_sizes(vocab_size=256, width=64, layers=2, head_size=32)
GREEDY = 0.0


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, compiled: bool = False
) -> RWKV7:
    """A model of these sizes whose weights are small random numbers, made where it lives."""
    model = RWKV7(config, dtype, "meta")
    weights = {
        name: torch.empty(x.shape, dtype=dtype, device=device).normal_(0, 0.02)
        for name, x in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    if compiled:
        model.compile_step()
    return model


@torch.no_grad()
def step_seconds(model: RWKV7, batch: int) -> float:
    """One decoding step of a full batch, with the likeliest ids taken from it."""
    pool = Pool(model.config, batch, model.dtype, model.device)
    decoder = Decoder(model, pool, deterministic=False, graphs=True)
    slots = list(range(batch))
    tokens = [1] * batch

    def step() -> None:
        decoder(tokens, slots).argmax(-1).tolist()

    return seconds(functools.partial(_repeat, step, 10), model.device) / 10


def _repeat(run: Callable[[], None], times: int) -> None:
    for _ in range(times):
        run()
