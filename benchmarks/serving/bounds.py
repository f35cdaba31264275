"""Decoding, prefill and sampling beside what the card can do: its bandwidth and product rate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rwkv7 import RWKV7, ModelConfig, ModelState
from rwkv7.benchmark.clock import kernels, seconds
from rwkv7.sampling import Sampler, sample_batch

from .models import GREEDY, Figures, Parts, random_model, step_seconds

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": GREEDY},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.5},
    "temperature, top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "the same, penalties": {
        **{"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        **{"presence": 0.3, "frequency": 0.3, "decay": 0.996},
    },
}


def bounds(
    config: ModelConfig,
    batches: Sequence[int],
    length: int,
    device: torch.device,
    compiled: bool = False,
) -> Parts:
    """Decoding beside the time to read weights and states; prefill beside a bare product's rate."""
    bandwidth, rate = _bandwidth(device), _product_rate(device)
    model = random_model(config, torch.bfloat16, device, compiled)
    # Of the embedding a step reads a row a sequence.
    matrices = sum(x.numel() for name, x in model.named_parameters() if not name.startswith("emb"))
    weights = {"weights_bytes": 2 * matrices}
    yield "measured", {"bytes_per_s": bandwidth, "flops_per_s": rate, **weights}
    steps = {}
    for batch in batches:
        state = ModelState.zeros(config, 1, torch.bfloat16, "meta")
        size = sum(x.nbytes for layer in state.layers for x in layer)
        bound = (2 * matrices + 2 * batch * size) / bandwidth
        step = steps[batch] = step_seconds(model, batch)
        rates = {"tokens_per_s": batch / step, "share_of_bound": bound / step}
        yield f"decode, batch {batch}", {"step_s": step, **rates}
    head = config.vocab_size * config.width
    for sequences in (1, 8):
        tokens = sequences * length // min(sequences, 2)
        found = _prefill(model, sequences, tokens, 2 * (matrices - head) / rate)
        yield f"prefill of {sequences} x {tokens // sequences}", found
    # Last: a profiler that has run once makes every later launch take longer.
    for batch, step in steps.items():
        for name, found in _sampling(model, batch, step).items():
            yield f"sampling, batch {batch}, {name}", found


@torch.no_grad()
def _prefill(model: RWKV7, sequences: int, tokens: int, at_best: float) -> dict[str, float]:
    """Reading packed prompts; `at_best` are the seconds of a token's products."""
    device = model.device
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    offsets = torch.arange(sequences + 1, device=device) * (tokens // sequences)
    packed = offsets if sequences > 1 else None
    once = seconds(lambda: model(ids, cu_seqlens=packed, last_only=True), device)
    return {
        "seconds": once,
        "tokens_per_s": tokens / once,
        "share_of_products": at_best * tokens / once,
    }


def _sampling(model: RWKV7, batch: int, step: float) -> Figures:
    """Choosing every row's next id: in all, on the device alone, and beside a step.

    Logits are as peaked as a trained model's; texts that are penalised have drawn 200 ids.
    """
    vocabulary, device = model.config.vocab_size, model.device
    logits = 3 * torch.randn(batch, vocabulary, device=device, dtype=model.dtype)
    runs: dict[str, Callable[[], object]] = {}
    for name, settings in SAMPLERS.items():
        samplers = [Sampler(seed=row, **settings) for row in range(batch)]
        for sampler in samplers:
            for token in range(200):
                sampler.accept(token * 7 % vocabulary)
        runs[name] = functools.partial(sample_batch, logits, samplers)
    took = {name: seconds(run, device) for name, run in runs.items()}
    found: Figures = {}
    for name, run in runs.items():
        alone = sum(float(kernel["ms"]) for kernel in kernels(run, device)) / 1000
        found[name] = {"seconds": took[name], "device_s": alone, "share_of_step": alone / step}
    return found


def _bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x), device)


def _product_rate(device: torch.device) -> float:
    """Operations a second of one large product in bfloat16."""
    size = 8192 if device.type == "cuda" else 512
    x = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / seconds(lambda: x @ x, device)
