"""Time series are told apart by RWKV-7's blocks alone: no tokens, no embedding, no head of words.

    python examples/classify_series.py [steps]

Each series is a slow wave under noise, rising or falling in pitch. `Block` reads real vectors
[B, T, C]; its last state is handed on, so a series may also come in pieces.
"""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rwkv7 import RWKV7, ModelConfig
from rwkv7.state import LayerState
from rwkv7.training.optim import make_optimizer
from rwkv7.training.settings import TrainSettings

LENGTH, CLASSES = 96, 2


class Classifier(nn.Module):
    """Numbers [B, T] -> one logit a class [B, 2], after the last number."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inputs = nn.Linear(1, config.width)
        # The blocks of a language model, whose initialisation is the official one.
        self.blocks = RWKV7(config).blocks
        self.norm = nn.LayerNorm(config.width)
        self.classes = nn.Linear(config.width, CLASSES)

    def forward(
        self, series: Tensor, states: list[LayerState | None] | None = None
    ) -> tuple[Tensor, list[LayerState | None]]:
        """The logits and the states to go on with."""
        x, added, v_first, after = self.inputs(series[..., None]), None, None, []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            x, added, v_first, state = block(x, added, v_first, state)
            after.append(state)
        return self.classes(self.norm((x + added)[:, -1])), after


def make_series(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Waves whose pitch falls (class 0) or rises (class 1), each with a phase and noise."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    time = torch.linspace(0, 1, LENGTH)
    pitch = torch.where(labels[:, None] == 1, 2 + 4 * time, 6 - 4 * time)
    phase = 2 * math.pi * torch.rand(count, 1, generator=generator)
    noise = 0.3 * torch.randn(count, LENGTH, generator=generator)
    return torch.sin(2 * math.pi * pitch.cumsum(1) / LENGTH + phase) + noise, labels


def main(steps: int = 80) -> None:
    """Train on fresh series, then count how many of 200 others are told right."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier(ModelConfig.from_sizes(vocab_size=1, width=32, layers=2, head_size=16))
    optimizer = make_optimizer(model, TrainSettings(lr=5e-3, weight_decay=0.01))
    for step in range(steps):
        series, labels = make_series(32, generator)
        loss = cross_entropy(model(series)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss.item():.3f}")
    with torch.no_grad():
        series, labels = make_series(200, generator)
        whole, _ = model(series)
        _, states = model(series[:, :40])
        parts, _ = model(series[:, 40:], states)
    print(f"told right: {(whole.argmax(1) == labels).float().mean():.0%}")
    print(f"in two pieces, the state handed on: differs by {(whole - parts).abs().max():.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
