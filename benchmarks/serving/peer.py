"""Beside the `rwkv` package in float32 on the CPU, from one checkpoint."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from rwkv7 import RWKV7, ModelConfig, save_model
from rwkv7.benchmark.clock import seconds
from rwkv7.engine import Engine, Request
from rwkv7.sampling import Sampler

from .models import GREEDY, Figures, random_model, step_seconds


def peer(config: ModelConfig, length: int) -> Figures:
    """Decoding and prefill beside the `rwkv` package in float32 on the CPU, from one checkpoint."""
    # Read by the package when it is imported.
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    device = torch.device("cpu")
    model = random_model(config, torch.float32, device)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model.pth")
        from rwkv.model import RWKV

        other: Any = RWKV(model=str(Path(folder) / "model"), strategy="cpu fp32")
    prompt = [i % config.vocab_size for i in range(length)]
    _, state = other.forward(prompt[:8], None)
    with torch.no_grad():
        tokens = torch.tensor([prompt])
        theirs = seconds(lambda: other.forward([1], state), device)
        ours = step_seconds(model, 1)
        their_prefill = seconds(lambda: other.forward(prompt, None), device)
        our_prefill = seconds(lambda: model(tokens, last_only=True), device)
    at_once = _engine_rate(model, 8)
    one_by_one = _engine_rate(model, 1)
    return {
        "decode": {
            "tokens_per_s": 1 / ours,
            "peer_tokens_per_s": 1 / theirs,
            "speed": theirs / ours,
        },
        f"prefill of {length}": {
            "tokens_per_s": length / our_prefill,
            "peer_tokens_per_s": length / their_prefill,
            "speed": their_prefill / our_prefill,
        },
        "eight sequences": {
            "tokens_per_s": at_once,
            "one_by_one_tokens_per_s": one_by_one,
            "speed": at_once / one_by_one,
        },
    }


def _engine_rate(model: RWKV7, slots: int) -> float:
    """Tokens a second of eight equal requests with this many slots."""
    engine = Engine(model, slots=slots)
    count = 16

    def eight() -> None:
        request = Request([1, 2, 3, 4], max_tokens=count, sampler=Sampler(GREEDY, seed=0))
        handles = [engine.submit(request) for _ in range(8)]
        engine.run_until_idle()
        del handles

    return 8 * count / seconds(eight, model.device)
