"""A sequence longer than memory: exact gradients window by window, beside one piece where it fits.

    python benchmarks/gpu/long_context.py OUT [--limit 570] [--tokens 262144] [--window 8192]

Random tokens through the 0.1B size under bf16 autocast. For each length: seconds, peak memory, and
how far the gradients of the windows are from those of one piece.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contestants import on_backend
from torch import Tensor

from rwkv7.benchmark.record import Record, release
from rwkv7.config import ModelConfig
from rwkv7.machine import device_called
from rwkv7.nn import RWKV7
from rwkv7.training.carry import sequence_gradients

Gradients = dict[str, Tensor]


def main() -> None:
    """All tokens in windows first, then each length in windows and in one piece."""
    options = _options()
    device = device_called(options.device)
    record = Record(options.out, "long_context", device, about=__doc__, limit=options.limit)
    config = ModelConfig.preset(options.preset)
    if options.layers:
        config = ModelConfig.from_sizes(
            vocab_size=options.vocabulary, width=options.width, layers=options.layers
        )
    torch.manual_seed(0)
    model = on_backend(config, options.backend, device)
    _perturb(model)
    ids = torch.randint(0, config.vocab_size, (1, options.tokens + 1)).to(device)
    warm = ids[:, : options.window + 1]
    _gradients(model, warm, options.window, options)  # kernels compiled outside the clock
    _both_ways(record, model, ids, options.tokens, [options.window], options)
    for length in options.lengths:
        _both_ways(record, model, ids, length, [options.window, length], options)


def _both_ways(
    record: Record,
    model: RWKV7,
    ids: Tensor,
    length: int,
    windows: list[int],
    options: argparse.Namespace,
) -> None:
    """One length with each size of window, and how far the gradients are from each other."""
    kept: list[Gradients] = []

    def measure(window: int) -> dict[str, Any]:
        found, gradients = _measured(model, ids[:, : length + 1], window, options)
        kept.append(gradients)
        return found

    for window in windows:
        name = "one piece" if window == length else f"windows of {window}"
        record.part(f"{length} tokens, {name}", functools.partial(measure, window), needs=20)
    if len(kept) == 2:
        record.keep({"part": f"{length} tokens, difference", **_difference(*kept)})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exact gradients of a long sequence.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--lengths", type=_numbers, default=[16_384, 32_768, 65_536])
    parser.add_argument("--backend", help="the operator's; default: the library's choice")
    parser.add_argument("--dtype", default="bfloat16", help="of products; float32: no autocast")
    parser.add_argument("--device")
    parser.add_argument("--preset", default="0.1b")
    parser.add_argument("--layers", type=int, help="with --width, --vocabulary: another size")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=256)
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


@torch.no_grad()
def _perturb(model: RWKV7) -> None:
    """Away from the initialisation, where output matrices of zero stop every other gradient."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and not bool(parameter.any()):
            parameter.normal_(std=0.02)


def _measured(
    model: RWKV7, ids: Tensor, window: int, options: argparse.Namespace
) -> tuple[dict[str, Any], Gradients]:
    device = ids.device
    model.zero_grad(set_to_none=True)
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    loss = _gradients(model, ids, window, options)
    seconds = time.perf_counter() - began
    tokens = ids.shape[1] - 1
    found = {"loss": loss, "seconds": seconds, "tokens_per_s": tokens / seconds}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        found |= {"peak_gib": peak / 2**30, "beyond_model_gib": (peak - before) / 2**30}
    # On the CPU, so that what is kept of one run is no memory of the next.
    gradients = {n: x.grad.cpu() for n, x in model.named_parameters() if x.grad is not None}
    model.zero_grad(set_to_none=True)
    return found, gradients


def _gradients(model: RWKV7, ids: Tensor, window: int, options: argparse.Namespace) -> float:
    dtype = getattr(torch, options.dtype)
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        found = sequence_gradients(model, ids[:, :-1], ids[:, 1:], window=window, mode="exact")
    return found.loss.item()


def _difference(ours: Gradients, one_piece: Gradients) -> dict[str, Any]:
    """‖x - one piece‖ / ‖one piece‖ of all gradients as one, and over the parameters."""
    each = {
        name: (_norm([ours[name] - x]) / max(_norm([x]), 1e-300)) for name, x in one_piece.items()
    }
    whole = _norm([ours[n] - x for n, x in one_piece.items()]) / _norm(list(one_piece.values()))
    worst = max(each, key=lambda name: each[name])
    median = statistics.median(each.values())
    return {"whole": whole, "median": median, "worst": each[worst], "worst_parameter": worst}


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(float(x.double().square().sum()) for x in tensors)) ** 0.5


if __name__ == "__main__":
    main()
