"""Whole training steps beside FLA's RWKV-7 model: tokens/s and memory; the MFU of a larger one.

    python benchmarks/gpu/train_model.py OUT [--limit 570] [--backend triton] [--parts ours,fla,mfu]
    python benchmarks/gpu/train_model.py OUT --profile [--plain]

A step is loss, gradients, clipping and AdamW over packed documents; both sides get the same ones.
Rows (of 4,096 tokens) are as many as fit both. What the sides are is in `contestants`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import Contestant, Fla, Ours
from step_profile import regions

from rwkv7.benchmark.record import Record, release
from rwkv7.config import ModelConfig
from rwkv7.machine import device_called
from rwkv7.nn.fused import use_fused
from rwkv7.training import TrainSettings
from rwkv7.training.batch import IGNORED, Batch
from rwkv7.training.watch.speed import Utilisation

DOCUMENTS = 4  # in a row, on average; a row's end always ends one
BATCHES = 3  # that steps take turns with
WARM_UP = 2 * BATCHES  # steps before the clock: kernels are compiled, tuned, and memory is taken
SECONDS, MOST_STEPS = 12.0, 30  # of a measurement


def main() -> None:
    """Measures what --parts names, the peer after ours at the same number of rows."""
    options = _options()
    with use_fused(False) if options.plain else contextlib.nullcontext():
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")  # both sides; the peer's loss has fp32 products
    device = device_called(options.device)
    if options.profile:
        return _profile(device, options)
    record = Record(options.out, "train_model", device, about=__doc__, limit=options.limit)
    parts = options.parts.split(",")
    config = _small(options)
    if "ours" in parts or "fla" in parts:
        _side_by_side(record, config, parts, options)
    if "mfu" in parts:
        _utilisation(record, options)


def _small(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig.from_sizes(
        vocab_size=options.vocabulary, width=options.width, layers=options.layers
    )


def _called(config: ModelConfig, rows: int) -> str:
    return f"ours, L{config.layers} C{config.width}, {rows} rows"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps beside FLA's RWKV-7 model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--backend", help="the operator's; default: the library's choice")
    parser.add_argument("--parts", default="ours,fla,mfu")
    parser.add_argument("--profile", action="store_true", help="one step of ours, by kernel")
    parser.add_argument("--plain", action="store_true", help="without our fused neighbours")
    parser.add_argument("--device")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--window", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=_numbers, default=[16, 8, 4], help="tried in turn")
    parser.add_argument("--large-layers", type=int, default=24)
    parser.add_argument("--large-width", type=int, default=2048)
    parser.add_argument("--large-rows", type=_numbers, default=[8, 4, 2, 1])
    parser.add_argument("--products", default="bfloat16", help="dtype of matrix products")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _side_by_side(
    record: Record, config: ModelConfig, parts: list[str], options: argparse.Namespace
) -> None:
    """Ours and each way to run the peer, at the most rows at which both sides have a result."""
    for rows in options.rows:
        began = len(record.parts)
        done = "ours" not in parts or _measure_ours(record, config, rows, options)
        if done and "fla" in parts:
            done = _measure_peer(record, config, rows, options)
        if done or record.left() < 60:
            return _compare(record, record.parts[began:])


def _measure_ours(
    record: Record, config: ModelConfig, rows: int, options: argparse.Namespace, again: bool = False
) -> bool:
    """`again`: layers are computed again going back."""
    settings = TrainSettings(layers=config.layers, width=config.width, checkpoint_layers=again)
    device, products = record.device, getattr(torch, options.products)
    batches = _batches(rows, options.window, config.vocab_size, device)

    def build() -> Contestant:
        return Ours(config, settings, device, backend=options.backend, products=products)

    name = _called(config, rows)
    name += ", layers computed again" if again else ""
    return record.part(name, lambda: _speed(build, batches, device), needs=30)


def _measure_peer(
    record: Record, config: ModelConfig, rows: int, options: argparse.Namespace
) -> bool:
    """True when one of the ways to run it gave something."""
    settings = TrainSettings(layers=config.layers, width=config.width)
    device, products = record.device, getattr(torch, options.products)
    batches = _batches(rows, options.window, config.vocab_size, device)
    done = False
    # Its kernels are tuned in the first and, for the dtypes that autocast makes, in the last, which
    # must leave time for the parts after it.
    for head, masters, needs in (
        ("linear", True, 60),
        ("logits", True, 30),
        ("linear", False, 240),
    ):
        build = functools.partial(
            Fla, config, settings, device, head=head, masters=masters, products=products
        )
        weights = "16-bit weights" if masters else "autocast"
        measure = functools.partial(_speed, build, batches, device)
        done |= record.part(f"fla, {head} loss, {weights}, {rows} rows", measure, needs)
    return done


def _compare(record: Record, parts: list[dict[str, Any]]) -> None:
    """Ours against the peer's fastest way, and against its smallest."""
    done = [part for part in parts if "tokens_per_s" in part]
    ours = [part for part in done if part["part"].startswith("ours")]
    peers = [part for part in done if part["part"].startswith("fla")]
    if not ours or not peers:
        return
    fastest = max(peers, key=lambda part: part["tokens_per_s"])
    smallest = min(peers, key=lambda part: part["peak_gib"] or 0)
    found = {"part": "ours / fla", "speed": ours[0]["tokens_per_s"] / fastest["tokens_per_s"]}
    found["fastest"], found["smallest"] = fastest["part"], smallest["part"]
    if smallest["peak_gib"]:
        found["memory_of_fastest"] = ours[0]["peak_gib"] / fastest["peak_gib"]
        found["memory_of_smallest"] = ours[0]["peak_gib"] / smallest["peak_gib"]
    record.keep(found)


def _utilisation(record: Record, options: argparse.Namespace) -> None:
    """The large model, first with all that a backward pass reads kept, then with layers redone."""
    config = ModelConfig.from_sizes(
        vocab_size=options.vocabulary, width=options.large_width, layers=options.large_layers
    )
    for again in (False, True):
        for rows in options.large_rows:
            if _measure_ours(record, config, rows, options, again):
                break


def _speed(
    build: Callable[[], Contestant], batches: list[Batch], device: torch.device
) -> dict[str, Any]:
    """Median seconds of a step by the wall clock, tokens/s, and the most memory in use."""
    began = time.perf_counter()
    contestant = build()
    losses = [contestant.step(batches[i % BATCHES], i)[0] for i in range(WARM_UP)]
    warm_up = time.perf_counter() - began
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    while len(times) < BATCHES or (len(times) < MOST_STEPS and sum(times) < SECONDS):
        start = time.perf_counter()
        # It reads the loss and the norm, and so ends when the step has ended.
        loss, _ = contestant.step(batches[len(times) % BATCHES], WARM_UP + len(times))
        _wait(device)
        times.append(time.perf_counter() - start)
        losses.append(loss)
    tokens = batches[0].inputs.numel()
    speed = tokens / statistics.median(times)
    ours = isinstance(contestant, Ours)
    return {
        "who": contestant.name,
        "tokens_a_step": tokens,
        "documents": [
            len(batch.cu_seqlens) - 1 for batch in batches if batch.cu_seqlens is not None
        ],
        "tokens_per_s": speed,
        "step_s": statistics.median(times),
        "slowest_step_s": max(times),
        "steps": len(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "warm_up_s": warm_up,
        "parameters": sum(x.numel() for x in contestant.model.parameters()),
        "mfu": Utilisation(contestant.model, torch.bfloat16).at(speed) if ours else None,
        "losses": losses,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batches(rows: int, window: int, vocabulary: int, device: torch.device) -> list[Batch]:
    """Rows of random tokens and random documents, all in one packed row of rows · window tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        tokens = rows * window
        ids = torch.randint(0, vocabulary, (1, tokens + 1), generator=generator)
        cuts = torch.randperm(tokens - 1, generator=generator)[: rows * (DOCUMENTS - 1)] + 1
        edges = torch.arange(0, tokens + 1, window)
        offsets = torch.cat((cuts, edges)).unique()
        targets = ids[:, 1:].clone()
        targets[:, offsets[1:] - 1] = IGNORED  # the token after a document is none of its own
        batch = Batch(inputs=ids[:, :-1].contiguous(), targets=targets, cu_seqlens=offsets.int())
        batches.append(batch.to(device))
    return batches


def _profile(device: torch.device, options: argparse.Namespace) -> None:
    """Where a step of ours spends its time, at the last number of rows."""
    about = (
        "Where the time of a training step goes: modules and their operations, backward included."
    )
    record = Record(options.out, "train_profile", device, about=about, limit=options.limit)
    config, rows = _small(options), options.rows[-1]
    settings = TrainSettings(layers=config.layers, width=config.width)
    products = getattr(torch, options.products)
    batches = _batches(rows, options.window, config.vocab_size, device)

    def measure() -> dict[str, Any]:
        ours = Ours(config, settings, device, backend=options.backend, products=products)
        for i in range(WARM_UP):
            ours.step(batches[i % BATCHES], i)
        found = regions(ours.model, lambda: ours.step(batches[0], WARM_UP), device)
        return {"who": ours.name, "tokens_a_step": batches[0].inputs.numel(), **found}

    plain = ", plain neighbours" if options.plain else ""
    record.part(_called(config, rows) + plain, measure)


if __name__ == "__main__":
    main()
