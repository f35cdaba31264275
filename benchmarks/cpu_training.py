"""The demo's training on this CPU, and the same with the recurrence token by token, side by side.

    OMP_NUM_THREADS=2 python benchmarks/cpu_training.py OUT

Whole steps of `rwkv7 demo`'s model on its text: windows, loss with L2Wrap, gradients, clipping and
AdamW. Only the operator differs: the library's own choice, the backend `reference`, and a tight
loop of two einsums a token (the `token loop` of `rwkv7 bench`). The median seconds and tokens/s of
each, and how many times theirs the library reaches. Worth keeping when nothing else runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from rwkv7 import RWKV7, ModelConfig, wkv7
from rwkv7.benchmark import einsum_loop
from rwkv7.benchmark.clock import seconds
from rwkv7.benchmark.record import Record
from rwkv7.cli.demo import demo_settings
from rwkv7.demo_text import load_text
from rwkv7.tokenizer import get_tokenizer
from rwkv7.training import TrainSettings
from rwkv7.training.optim import make_optimizer
from rwkv7.training.sources import Windows
from rwkv7.training.step import step_gradients
from rwkv7.training.tuning import Tuning

CPU = torch.device("cpu")
OURS = "rwkv7"


def reference(*inputs: Tensor | None, **given: Any) -> tuple[Tensor, Tensor]:
    """`wkv7` by the backend of that name, whichever was asked for."""
    return wkv7(*inputs, **{**given, "backend": "reference"})


def token_by_token(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """`wkv7` of whole rows, as a loop of two einsums a token."""
    B, _, H, K = r.shape
    return einsum_loop(
        r, w, k, v, a, b, r.new_zeros(B, H, v.shape[-1], K) if state is None else state
    )


OPERATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    OURS: wkv7,
    "backend reference": reference,
    "two einsums a token": token_by_token,
}


def steps(settings: TrainSettings) -> Callable[[], Tensor]:
    """A function that takes one step more of a training that begins anew, and gives its loss."""
    tokenizer = get_tokenizer(settings.tokenizer)
    sizes = {"width": settings.width, "layers": settings.layers, "head_size": settings.head_size}
    torch.manual_seed(settings.seed)
    tuning = Tuning(RWKV7(ModelConfig.from_sizes(vocab_size=tokenizer.vocab_size, **sizes)))
    optimizer = make_optimizer(tuning.model, settings)
    tokens = np.asarray(tokenizer.encode(load_text()), np.uint8)
    source = Windows(tokens, window=settings.window, batch=settings.batch, seed=settings.seed)
    done = iter(range(settings.steps))

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = step_gradients(tuning, source.batch(next(done)), settings)
        clip_grad_norm_(tuning.model.parameters(), settings.clip)
        optimizer.step()
        return loss

    return step


def main(out: Path, settings: TrainSettings | None = None) -> None:
    """Measure, print, and keep it in the folder `out`."""
    settings = settings or demo_settings()
    tokens = settings.batch * settings.window
    record = Record(out, "cpu_training", CPU, about=__doc__)
    speeds: dict[str, float] = {}
    for name, operator in OPERATORS.items():
        with mock.patch("rwkv7.nn.time_mix.wkv7", operator):
            loss = steps(settings)().item()
            taken = seconds(steps(settings), CPU)
        speeds[name] = tokens / taken
        record.keep({"part": name, "tokens_per_s": speeds[name], "step_s": taken, "loss": loss})
    for name, speed in speeds.items():
        if name != OURS:
            record.keep({"part": f"{OURS} / {name}", "speed": speeds[OURS] / speed})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder for the JSON file")
    main(parser.parse_args().out)
