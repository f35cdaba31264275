"""Two models that learn the same real text: this library's recipe, and FLA's model as it comes.

    python benchmarks/gpu/loss_curve.py OUT [--limit 570] [--steps 2000]
    python benchmarks/gpu/loss_curve.py OUT --draw        # the picture again, from the files

Bytes of the King James text that comes with the package; both sides see the same windows in the
same order, and the learning rate follows the same schedule. A line of JSON a step and side.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Fla, Ours
from record import Record, release

from rwkv7.config import ModelConfig
from rwkv7.demo_text import load_text, split
from rwkv7.files import write_atomically
from rwkv7.machine import device_called
from rwkv7.tokenizer import ByteTokenizer
from rwkv7.training import TrainSettings
from rwkv7.training.batch import Batch
from rwkv7.training.sources.windows import Windows
from rwkv7.verification.untuned import untuned

SIDES = ("rwkv7", "fla")
SMOOTHED = 0.98  # a moving average over some 50 steps
HELD_OUT_ROWS = 16  # windows of held-out text at a time


def main() -> None:
    """Trains both sides one after the other, then draws both curves."""
    options = _options()
    if options.draw:
        return draw(options.out)
    torch.set_float32_matmul_precision("high")
    device = device_called(options.device)
    settings = TrainSettings(
        steps=options.steps,
        layers=options.layers,
        width=options.width,
        window=options.window,
        batch=options.batch,
        lr=options.lr,
        lr_final=options.lr / 10,
    )
    record = Record(options.out, "loss_curve", device, options.limit)
    record.keep({"part": "settings", **settings.to_dict()})
    for side in options.sides.split(","):
        train = functools.partial(_side, side, settings, options, record)
        record.part(side, train, needs=30)
        draw(options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Loss on real text beside FLA's default.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--draw", action="store_true", help="train nothing, draw what is there")
    parser.add_argument("--backend", help="the operator's; default: the library's choice")
    parser.add_argument("--device")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--products", default="bfloat16", help="dtype of matrix products")
    return parser.parse_args()


def _side(
    side: str, settings: TrainSettings, options: argparse.Namespace, record: Record
) -> dict[str, Any]:
    """Trains and reads one side. What is wanted of FLA here is its loss, not its speed."""
    config = ModelConfig.from_sizes(
        vocab_size=ByteTokenizer().vocab_size, width=settings.width, layers=settings.layers
    )
    contestant = _contestant(side, config, settings, options, record.device)
    with untuned("fla"):
        return _train(contestant, side, settings, options, record)


def _train(
    contestant: Contestant,
    side: str,
    settings: TrainSettings,
    options: argparse.Namespace,
    record: Record,
) -> dict[str, Any]:
    """All steps of one side, unless the time runs out, and then the held-out text."""
    device, tokenizer = record.device, ByteTokenizer()
    train, held_out = (np.array(tokenizer.encode(text), np.int64) for text in split(load_text()))
    source = Windows(train, window=settings.window, batch=settings.batch, seed=settings.seed)
    began, stop, loss, step = time.perf_counter(), _share(side, options, record), math.nan, 0
    with (options.out / f"loss_{side}.jsonl").open("w", encoding="utf-8") as log:
        for step in range(settings.steps):
            loss, norm = contestant.step(source.batch(step).to(device), step)
            log.write(json.dumps({"step": step + 1, "loss": loss, "grad_norm": norm}) + "\n")
            if record.left() < stop or not math.isfinite(loss):
                break
    seconds = time.perf_counter() - began
    bits = _held_out_bits(contestant, held_out, settings.window, device)
    found = {"who": contestant.name, "steps": step + 1, "last_loss": loss, "seconds": seconds}
    count = sum(x.numel() for x in contestant.model.parameters())
    return found | {"held_out_bits_per_byte": bits, "parameters": count}


def _share(side: str, options: argparse.Namespace, record: Record) -> float:
    """Seconds that must be left when a side stops: sides to come have as much as this one."""
    sides = options.sides.split(",")
    after = len(sides) - 1 - sides.index(side)
    return 15 + record.left() * after / (after + 1)


def _contestant(
    side: str,
    config: ModelConfig,
    settings: TrainSettings,
    options: argparse.Namespace,
    device: torch.device,
) -> Contestant:
    products = getattr(torch, options.products)
    if side == "rwkv7":
        return Ours(config, settings, device, backend=options.backend, products=products)
    if side == "fla":
        return Fla(config, settings, device, head="logits", products=products)
    raise ValueError(f"sides: expected some of {', '.join(SIDES)}, found {side!r}")


def _held_out_bits(
    contestant: Contestant, text: np.ndarray, window: int, device: torch.device
) -> float:
    """Bits a byte of `text`, in windows that each begin with an empty state."""
    release(device)
    nats = bytes_read = 0.0
    for rows in _rows(torch.from_numpy(text), window):
        batch = Batch(inputs=rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())
        nats += contestant.loss(batch.to(device)) * batch.targets.numel()
        bytes_read += batch.targets.numel()
    return nats / bytes_read / math.log(2)


def _rows(text: torch.Tensor, window: int) -> Iterator[torch.Tensor]:
    # A window's last byte is the next one's first: each is foretold once, but for what is left.
    yield from text.unfold(0, window + 1, window).split(HELD_OUT_ROWS)


def draw(folder: Path) -> None:
    """Both curves, smoothed, into loss_curve.png; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("loss_curve.png needs matplotlib; --draw makes it from the files later")
        return
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panel = figure.subplots()
    bits = _last_bits(folder / "loss_curve.json")
    for side, color in zip(SIDES, ("C0", "C3"), strict=True):
        path = folder / f"loss_{side}.jsonl"
        if not path.is_file():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps = [line["step"] for line in lines]
        losses = [line["loss"] / math.log(2) for line in lines]
        label = {"rwkv7": "rwkv7 (official recipe)", "fla": "FLA's default"}[side]
        if side in bits:
            label += f": held out {bits[side]:.3f}"
        panel.plot(steps, losses, color=color, alpha=0.15, lw=0.6)
        panel.plot(steps, _smooth(losses), color=color, lw=1.6, label=label)
    panel.set_xlabel("step")
    panel.set_ylabel("training loss, bits per byte")
    panel.set_ylim(1, 4)
    panel.grid(color="0.9")
    panel.legend(frameon=False)
    figure.suptitle("King James text: same sizes, windows, order, schedule")
    path = folder / "loss_curve.png"
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def _smooth(losses: list[float]) -> list[float]:
    """An exponential moving average that begins without a bias to its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = SMOOTHED * total + (1 - SMOOTHED) * loss
        weight = SMOOTHED * weight + 1 - SMOOTHED
        smoothed.append(total / weight)
    return smoothed


def _last_bits(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    key = "held_out_bits_per_byte"
    return {part["part"]: part[key] for part in parts if key in part}


if __name__ == "__main__":
    main()
