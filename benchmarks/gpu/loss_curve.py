"""Two models that learn the same real text: this library's recipe, and FLA's model as it comes.

    python benchmarks/gpu/loss_curve.py OUT [--limit 570] [--steps 2000] [--text FILE]
    python benchmarks/gpu/loss_curve.py OUT --draw PICTURE.png     # train nothing, draw the newest

Bytes of a file, or of the King James text that comes with the package; both sides see the same
windows in the same order, and the learning rate follows the same schedule. A text of more than
steps x batch x window bytes is read once, a shorter one again. The losses of all steps are kept.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Fla, Ours

from rwkv7.benchmark.pages import runs_in
from rwkv7.benchmark.record import Record, release
from rwkv7.config import ModelConfig
from rwkv7.demo_text import load_text, split
from rwkv7.files import write_atomically
from rwkv7.machine import device_called
from rwkv7.tokenizer import ByteTokenizer
from rwkv7.training import TrainSettings
from rwkv7.training.batch import Batch
from rwkv7.training.sources.windows import Windows
from rwkv7.verification.plot import picture_format
from rwkv7.verification.untuned import untuned

LABELS = {"rwkv7": "rwkv7 (official recipe)", "fla": "FLA's default"}
SMOOTHED = 0.98  # a moving average over some 50 steps
HELD_OUT_ROWS = 16  # windows of held-out text at a time


def main() -> None:
    """Trains both sides one after the other, then draws both curves."""
    options = _options()
    if options.draw:
        return draw(options.out, options.draw)
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
        seed=options.seed,
    )
    record = Record(options.out, "loss_curve", device, about=__doc__, limit=options.limit)
    about = _about(options.text)
    record.keep({"part": "settings", "text": about, **settings.to_dict()})
    for side in options.sides.split(","):
        train = functools.partial(_side, side, settings, options, record)
        record.part(side, train, needs=30)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Loss on real text beside FLA's default.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--text", type=Path, help="what is learnt; default: the King James text")
    parser.add_argument("--sides", default=",".join(LABELS))
    parser.add_argument(
        "--draw", type=Path, metavar="PICTURE", help="of what OUT has, .png or .svg"
    )
    parser.add_argument("--backend", help="the operator's; default: the library's choice")
    parser.add_argument("--device")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order")
    parser.add_argument("--products", default="bfloat16", help="dtype of matrix products")
    return parser.parse_args()


def _text(file: Path | None) -> bytes:
    return load_text() if file is None else file.read_bytes()


def _about(file: Path | None) -> str:
    if file is None:
        return "King James text"
    return f"{file.stem.replace('_', ' ')}, {len(_text(file)) / 1e6:.1f} MB"


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
    train, held_out = (
        np.array(tokenizer.encode(text), np.int64) for text in split(_text(options.text))
    )
    source = Windows(train, window=settings.window, batch=settings.batch, seed=settings.seed)
    began, stop = time.perf_counter(), _share(side, options, record)
    losses: list[float] = []
    for step in range(settings.steps):
        loss, _ = contestant.step(source.batch(step).to(device), step)
        losses.append(round(loss, 4))
        if record.left() < stop or not math.isfinite(loss):
            break
    return {
        "who": contestant.name,
        "steps": len(losses),
        "last_loss": losses[-1],
        "seconds": time.perf_counter() - began,
        "held_out_bits_per_byte": _held_out_bits(contestant, held_out, settings.window, device),
        "parameters": sum(x.numel() for x in contestant.model.parameters()),
        "losses": losses,
    }


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
    raise ValueError(f"sides: expected some of {', '.join(LABELS)}, found {side!r}")


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


def draw(folder: Path, picture: Path) -> None:
    """The newest curve of each side in the folder's results, and its moving average."""
    from matplotlib.figure import Figure

    runs = [run for run in runs_in(folder) if run["benchmark"] == "loss_curve"]
    found = {part["part"]: part for run in runs for part in run["parts"] if part.get("losses")}
    if not found:
        raise SystemExit(f"{folder}: no loss curve; train first")
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panel = figure.subplots()
    for (side, label), color in zip(LABELS.items(), ("C0", "C3"), strict=True):
        if side not in found:
            continue
        losses = [loss / math.log(2) for loss in found[side]["losses"]]
        steps = range(1, len(losses) + 1)
        label += f": held out {found[side]['held_out_bits_per_byte']:.3f}"
        panel.plot(steps, losses, color=color, alpha=0.15, lw=0.6)
        panel.plot(steps, _smooth(losses), color=color, lw=1.6, label=label)
    panel.set_xlabel("step")
    panel.set_ylabel("training loss, bits per byte")
    panel.set_ylim(1, 4)
    panel.grid(color="0.9")
    panel.legend(frameon=False)
    devices = " and ".join(dict.fromkeys(run["device"] for run in runs))
    texts = {part["text"] for run in runs for part in run["parts"] if "text" in part}
    text = " and ".join(sorted(texts)) or _about(None)
    figure.suptitle(f"{text}: same sizes, windows, order, schedule ({devices})")
    suffix = picture_format(picture)
    write_atomically(picture, lambda file: figure.savefig(file, dpi=150, format=suffix))


def _smooth(losses: list[float]) -> list[float]:
    """An exponential moving average that begins without a bias to its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = SMOOTHED * total + (1 - SMOOTHED) * loss
        weight = SMOOTHED * weight + 1 - SMOOTHED
        smoothed.append(total / weight)
    return smoothed


if __name__ == "__main__":
    main()
