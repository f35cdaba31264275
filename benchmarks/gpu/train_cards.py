"""Training on several GPUs: tokens per second beside one GPU, and gradients beside one GPU's.

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu/train_cards.py OUT

A whole step is timed (forward, backward, clipping, AdamW), fp32 weights and products in bf16, with
the same number of rows on each card; the speed is over that of the first card alone. Then
one sequence lies in pieces over all cards, and its gradients are compared with one card's.
Without GPUs it runs over Gloo, for a try in small:

    torchrun --standalone --nproc-per-node 2 benchmarks/gpu/train_cards.py OUT \\
        --layers 2 --width 64 --vocabulary 64 --batch 2 --window 64 --steps 2
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

from rwkv7 import RWKV7, ModelConfig
from rwkv7.benchmark.record import Record, release
from rwkv7.nn import initialise_
from rwkv7.training import TrainSettings
from rwkv7.training.batch import Batch
from rwkv7.training.loss import next_token_loss
from rwkv7.training.optim import make_optimizer
from rwkv7.training.parallel import ContextParallel, joined, parallelise, sum_gradients

WARM_UP = 3  # steps before the clock starts


def make_model(options: argparse.Namespace, device: torch.device, loud: bool = False) -> RWKV7:
    """fp32, from the official start; `loud`: the matrices that start at zero are random too."""
    config = ModelConfig.from_sizes(
        vocab_size=options.vocabulary, width=options.width, layers=options.layers, head_size=64
    )
    model = RWKV7(config, torch.float32, device)
    initialise_(model, torch.Generator().manual_seed(0))
    if loud:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, x in model.named_parameters():
                if x.dim() == 2 and not x.any():
                    noise = torch.randn(x.shape, generator=generator) / math.sqrt(x.shape[-1])
                    x.copy_(0.3 * noise if "_" in name else noise)
    return model


def make_batch(options: argparse.Namespace, rows: int, device: torch.device) -> Batch:
    """Random tokens; speed does not depend on which."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(options.vocabulary, (rows, options.window + 1), generator=generator)
    return Batch(inputs=tokens[:, :-1], targets=tokens[:, 1:]).to(device)


def wait(device: torch.device) -> None:
    """Until the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tokens_per_second(
    step: Callable[[], object], tokens: int, steps: int, device: torch.device
) -> float:
    """Of `steps` steps of so many tokens, after warm-up."""
    for _ in range(WARM_UP):
        step()
    wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return tokens * steps / (time.perf_counter() - started)


def one_card(options: argparse.Namespace, device: torch.device) -> float:
    """Tokens per second of a plain loop."""
    model = make_model(options, device)
    optimizer = make_optimizer(model, TrainSettings())
    batch = make_batch(options, options.batch, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            features, _ = model.hidden(batch.inputs, backend=options.backend)
            loss = next_token_loss(model.head, features, batch.targets)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return tokens_per_second(step, batch.inputs.numel(), options.steps, device)


def all_cards(options: argparse.Namespace, device: torch.device, mode: Any) -> float:
    """Tokens per second of all ranks together."""
    cards = parallelise(
        make_model(options, device), mode, autocast=torch.bfloat16, backend=options.backend
    )
    optimizer = make_optimizer(cards.model, TrainSettings())
    batch = make_batch(options, options.batch, device)
    tokens = batch.inputs.numel() * cards.size

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cards.backward([batch], tokens)
        cards.clip_(1.0)
        optimizer.step()

    return tokens_per_second(step, tokens, options.steps, device)


def gradients(
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    mine: slice,
    pieces: bool,
) -> dict[str, torch.Tensor]:
    """Of every parameter, from one row; with products in bf16, or all in `dtype`."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    model = make_model(options, device, loud=True).to(wide)
    called = ContextParallel(model) if pieces else model
    batch = make_batch(options, 1, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        backend = options.backend if dtype == torch.bfloat16 else None
        features, _ = called.hidden(batch.inputs[:, mine], backend=backend)
        loss = next_token_loss(
            model.head, features, batch.targets[:, mine], denominator=batch.targets.numel()
        )
    loss.backward()
    if pieces:
        sum_gradients(model.parameters())
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def context_errors(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The worst relative error of a gradient, in pieces and on one card, against one card's fp64.

    The pieces are uneven on purpose. In bf16 both lie at the rounding of the products.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    edges = [round(options.window * (i / size) ** 1.2) for i in range(size + 1)]
    piece, whole = slice(edges[rank], edges[rank + 1]), slice(None)
    exact = gradients(options, device, torch.float64, whole, False)
    table: dict[str, Any] = {}
    for name, dtype in (
        ("fp64", torch.float64),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
    ):
        for where, pieces in (("in pieces", True), ("on one", False)):
            found = gradients(options, device, dtype, piece if pieces else whole, pieces)
            errors = {
                key: float((found[key].double() - x).norm() / x.norm()) for key, x in exact.items()
            }
            worst = max(errors, key=errors.__getitem__)
            table[f"{name} {where}"] = {"worst": errors[worst], "worst_parameter": worst}
    return table


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=8, help="rows on each card")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", help="the operator's, for the bf16 parts")
    parser.add_argument("--context-layers", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Measure on all ranks, write on the first."""
    options = parse()
    with joined() as device:
        cards, first = dist.get_world_size(), dist.get_rank() == 0
        record = Record(options.out, "train_cards", device, about=__doc__) if first else None

        def note(name: str, **figures: Any) -> None:
            if record:
                record.keep({"part": f"{name}, {cards} cards", **figures})

        # All cards at once would heat and clock alike; the others wait for the first.
        speed = torch.zeros((), dtype=torch.float64, device=device)
        if first:
            speed += one_card(options, device)
        dist.broadcast(speed, 0)
        alone = float(speed)
        note("one of", tokens_per_s=alone, speed=1.0)
        for mode in ("ddp", "fsdp"):
            together = all_cards(options, device, mode)
            note(mode, tokens_per_s=together, speed=together / alone)
            release(device)
        options.layers = options.context_layers
        options.vocabulary = min(options.vocabulary, 4096)
        for name, worst in context_errors(options, device).items():
            note(f"one sequence, {name}", **worst)


if __name__ == "__main__":
    main()
