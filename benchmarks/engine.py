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
from collections.abc import Sequence
from pathlib import Path

import torch
from serving.bounds import bounds
from serving.mixed import mixed
from serving.models import TINY, Figures, Parts, random_model
from serving.peer import peer
from serving.soak import soak

from rwkv7 import ModelConfig
from rwkv7.benchmark.record import Record
from rwkv7.machine import device_called

ABOUT = {
    "soak": "The engine with many short requests, one in five cancelled: what is left of them.",
    "mixed": "The engine with requests of mixed lengths, beside full batches of the bare model.",
    "peer": "Decoding and prefill in float32 on the CPU beside the `rwkv` package, one checkpoint.",
    "bounds": "Decoding beside the time to read weights and states, prefill beside bare products.",
}


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
    parts: Parts
    record = Record(given.out, f"engine_{given.part}", device, about=ABOUT[given.part])
    if given.part == "peer":
        parts = iter(peer(config, 1024 if size != "tiny" else 64).items())
    elif given.part == "bounds":
        batches, length = ((1, 320), 4096) if size != "tiny" else ((1, 4), 64)
        parts = bounds(config, batches, length, device, given.compile)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = random_model(config, dtype, device, given.compile)
        if given.part == "soak":
            parts = iter(soak(model, given.slots, given.requests or 10_000).items())
        else:
            parts = mixed(model, given.slots, given.requests or 1000)
    compiled = ", compiled" if given.compile else ""
    figures: Figures = {}
    for name, found in parts:
        record.keep({"part": f"{size}{compiled}: {name}", **found})
        figures[name] = found
    return figures


if __name__ == "__main__":
    main()
