"""Measures the engine: a soak, mixed lengths beside full batches, the `rwkv` package, bounds.

    python benchmarks/engine.py OUT soak               # 10,000 short requests with random cancels
    python benchmarks/engine.py OUT mixed              # 1,000 requests, and deterministic=True
    python benchmarks/engine.py OUT peer --threads 2   # beside the rwkv package, on the CPU
    python benchmarks/engine.py OUT bounds             # on a GPU: bandwidth and product rate

Weights are random: speed does not depend on them. Each run leaves one JSON file in the folder OUT
with the figures, date, machine and versions. A figure is worth keeping when nothing else ran.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rwkv7 import RWKV7, ModelConfig, ModelState, save_model
from rwkv7.benchmark.clock import seconds
from rwkv7.benchmark.record import Record
from rwkv7.engine import Engine, Request
from rwkv7.engine.decoder import Decoder
from rwkv7.engine.pool import Pool
from rwkv7.machine import device_called
from rwkv7.sampling import Sampler

Figures = dict[str, dict[str, Any]]
TINY = ModelConfig.from_sizes(vocab_size=256, width=64, layers=2, head_size=32)
GREEDY = 0.0
ABOUT = {
    "soak": "The engine with many short requests, one in five cancelled: what is left of them.",
    "mixed": "The engine with requests of mixed lengths, beside full batches of the bare model.",
    "peer": "Decoding and prefill in float32 on the CPU beside the `rwkv` package, one checkpoint.",
    "bounds": "Decoding beside the time to read weights and states, prefill beside bare products.",
}


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


def soak(model: RWKV7, slots: int, count: int) -> Figures:
    """Short requests, some of them cancelled; the pool and the memory before and after."""
    chance = random.Random(0)
    engine = Engine(model, slots=slots)
    # What is made once and kept, such as masks, is made before the count.
    first = [engine.submit(Request([1] * length, max_tokens=2)) for length in (*range(1, 9), 99)]
    engine.run_until_idle()
    del first
    before, start = _memory(model.device), time.perf_counter()
    waiting, reasons = [], {"length": 0, "cancelled": 0}
    for number in range(count):
        length = chance.randint(1, 8)
        tokens = [chance.randrange(model.config.vocab_size) for _ in range(length)]
        waiting.append(engine.submit(Request(tokens, max_tokens=chance.randint(1, 8))))
        if chance.random() < 0.2:
            chance.choice(waiting).cancel()
        if number % slots == slots - 1:
            engine.step()
            for handle in [handle for handle in waiting if handle.done]:
                reasons[handle.result().finish_reason] += 1
                waiting.remove(handle)
    engine.run_until_idle()
    for handle in waiting:
        reasons[handle.result().finish_reason] += 1
    waiting.clear()
    del handle
    elapsed = time.perf_counter() - start
    after = _memory(model.device)
    return {
        "soak": {
            "requests": count,
            "cancelled": reasons["cancelled"],
            "seconds": elapsed,
            "slots_free": f"{engine.free_slots} of {slots}",
            "tensors_before": before["tensors"],
            "tensors_after": after["tensors"],
            "memory_before": before,
            "memory_after": after,
        }
    }


def mixed(model: RWKV7, slots: int, count: int) -> Figures:
    """Requests of mixed lengths through the engine, beside full equal batches of the bare model."""
    longest = 256 if count >= 1000 else 16
    prefill_tokens = 8 * longest
    decode = slots / _step_seconds(model, slots)
    prompt = torch.zeros(1, prefill_tokens, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        once = seconds(lambda: model.hidden(prompt), model.device)
    figures: Figures = {
        "bare model": {
            "slots": slots,
            "decode_tokens_per_s": decode,
            "prefill_tokens_per_s": prefill_tokens / once,
        },
    }
    for name, deterministic in (("engine", False), ("deterministic", True)):
        engine = Engine(
            model, slots=slots, max_prefill_tokens=prefill_tokens, deterministic=deterministic
        )
        read, drawn, elapsed = _run_mixed(engine, model.config.vocab_size, count, longest)
        ideal = read * once / prefill_tokens + drawn / decode
        figures[name] = {
            "requests": count,
            "slots": slots,
            "seconds": elapsed,
            "drawn_tokens_per_s": drawn / elapsed,
            "share_of_bare": ideal / elapsed,
        }
    ratio = figures["engine"]["seconds"] / figures["deterministic"]["seconds"]
    figures["deterministic / engine"] = {"speed": ratio}
    return figures


def _run_mixed(engine: Engine, vocabulary: int, count: int, longest: int) -> tuple[int, int, float]:
    """(ids read, ids drawn, seconds)."""
    chance = random.Random(1)
    handles, read = [], 0
    start = time.perf_counter()
    for _ in range(count):
        tokens = [chance.randrange(vocabulary) for _ in range(chance.randint(1, longest))]
        read += len(tokens)
        request = Request(
            tokens, max_tokens=chance.randint(1, longest), sampler=Sampler(GREEDY, seed=0)
        )
        handles.append(engine.submit(request))
    engine.run_until_idle()
    drawn = sum(len(handle.result().tokens) for handle in handles)
    return read, drawn, time.perf_counter() - start


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
        ours = _step_seconds(model, 1)
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


def bounds(
    config: ModelConfig,
    batches: Sequence[int],
    length: int,
    device: torch.device,
    compiled: bool = False,
) -> Figures:
    """Decoding beside the time to read weights and states; prefill beside a bare product's rate."""
    bandwidth, rate = _bandwidth(device), _product_rate(device)
    model = random_model(config, torch.bfloat16, device, compiled)
    # Of the embedding a step reads a row a sequence.
    matrices = sum(x.numel() for name, x in model.named_parameters() if not name.startswith("emb"))
    figures: Figures = {
        "measured": {
            "bytes_per_s": bandwidth,
            "flops_per_s": rate,
            "weights_bytes": 2 * matrices,
        }
    }
    for batch in batches:
        state = ModelState.zeros(config, 1, torch.bfloat16, "meta")
        size = sum(x.nbytes for layer in state.layers for x in layer)
        bound = (2 * matrices + 2 * batch * size) / bandwidth
        step = _step_seconds(model, batch)
        figures[f"decode, batch {batch}"] = {
            "step_s": step,
            "tokens_per_s": batch / step,
            "share_of_bound": bound / step,
        }
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    with torch.no_grad():
        once = seconds(lambda: model(tokens, last_only=True), device)
    head = config.vocab_size * config.width
    figures[f"prefill of {length}"] = {
        "seconds": once,
        "tokens_per_s": length / once,
        "share_of_products": 2 * (matrices - head) * length / once / rate,
    }
    return figures


@torch.no_grad()
def _step_seconds(model: RWKV7, batch: int) -> float:
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


def _memory(device: torch.device) -> dict[str, int]:
    """How many tensors there are, and the bytes that a GPU's are in."""
    gc.collect()
    found = {"tensors": sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())}
    if device.type == "cuda":
        found["bytes"] = torch.cuda.memory_allocated(device)
    return found


def main(arguments: Sequence[str] | None = None) -> Figures:
    """Run one part and write its figures; returns them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder for the JSON file")
    parser.add_argument("part", choices=ABOUT)
    parser.add_argument("--model", help="tiny, or a published size such as 0.1b, 1.5b or 7.2b")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--requests", type=int, help="default 10,000 for soak, 1,000 for mixed")
    parser.add_argument("--device", help="default the best there is; peer has the CPU")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    size = given.model or {"soak": "tiny", "peer": "0.1b"}.get(given.part, "1.5b")
    config = TINY if size == "tiny" else ModelConfig.preset(size)
    device = torch.device("cpu") if given.part == "peer" else device_called(given.device)
    record = Record(given.out, f"engine_{given.part}", device, about=ABOUT[given.part])
    if given.part == "peer":
        figures = peer(config, 1024 if size != "tiny" else 64)
    elif given.part == "bounds":
        batches, length = ((1, 320), 4096) if size != "tiny" else ((1, 4), 64)
        figures = bounds(config, batches, length, device, given.compile)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = random_model(config, dtype, device, given.compile)
        run, count = (soak, 10_000) if given.part == "soak" else (mixed, 1000)
        figures = run(model, given.slots, given.requests or count)
    compiled = ", compiled" if given.compile else ""
    for name, found in figures.items():
        record.keep({"part": f"{size}{compiled}: {name}", **found})
    return figures


if __name__ == "__main__":
    main()
