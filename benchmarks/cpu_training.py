"""The demo's training on this CPU, and the same with the recurrence token by token, side by side.

    OMP_NUM_THREADS=2 python benchmarks/cpu_training.py [OUT.json]

Whole steps of `rwkv7 demo`'s model on its text: windows, loss with L2Wrap, gradients, clipping and
AdamW. Only the operator differs: the library's own choice, the backend `reference`, and a tight
loop of two einsums a token (the `token loop` of `rwkv7 bench`). Prints the median seconds and
tokens/s of each, and how many times theirs the library reaches. Worth keeping when nothing else
runs.
"""

from __future__ import annotations

import datetime
import json
import sys
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
from rwkv7.cli.demo import demo_settings
from rwkv7.demo_text import load_text
from rwkv7.files import write_atomically
from rwkv7.machine import describe
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


def main(out: Path | None = None, settings: TrainSettings | None = None) -> dict[str, Any]:
    """Measure, print, and write to `out`."""
    settings = settings or demo_settings()
    tokens = settings.batch * settings.window
    figures: dict[str, Any] = {}
    for name, operator in OPERATORS.items():
        with mock.patch("rwkv7.nn.time_mix.wkv7", operator):
            loss = steps(settings)().item()
            taken = seconds(steps(settings), CPU)
        figures[name] = {"loss": loss, "seconds": taken, "tokens_per_second": tokens / taken}
        print(f"{name:20}  {taken * 1e3:9.1f} ms a step  {tokens / taken:9,.0f} tokens/s")
    ours = figures[OURS]["tokens_per_second"]
    times = {x: ours / found["tokens_per_second"] for x, found in figures.items() if x != OURS}
    told = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in times.items())
    print(f"{OURS} is {told}; {torch.get_num_threads()} threads")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result = {"date": date, "machine": describe(), "times": times, "figures": figures}
    if out:
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    return result


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
