"""Training beyond the window: what was read several windows ago is learned, and what is not.

    python examples/recall_across_windows.py [steps]

The first window of each sequence pairs keys with values, then comes noise, and the last window asks
for the value of each key. Three models train on the same sequences, in the memory of one window:
one drops its state at each window as usual, one carries it but cuts the gradient (truncated), one
carries both (exact). The first cannot know more than chance; the second could, but nothing teaches
its first window what the last one will need. A plot is saved as recall_across_windows.png.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from rwkv7 import RWKV7, ModelConfig
from rwkv7.training.batch import IGNORED
from rwkv7.training.carry import sequence_gradients

KEYS, VALUES, NOISE = 4, 8, 4
WINDOW, WINDOWS = 8, 4
LAST = WINDOW * (WINDOWS - 1)  # where the last window begins
VOCABULARY = KEYS + VALUES + NOISE
MODES = {
    "off": "state dropped",
    "truncated": "state carried, gradient cut",
    "exact": "state carried, exact gradient",
}


def sequences(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [count, T]: only the answers in the last window are predicted."""
    values = torch.randint(KEYS, KEYS + VALUES, (count, KEYS), generator=generator)
    order = torch.stack([torch.rand(count, KEYS, generator=generator).argsort(1) for _ in "qa"])
    tokens = torch.randint(
        KEYS + VALUES, VOCABULARY, (count, WINDOW * WINDOWS + 1), generator=generator
    )
    for keys, start in zip(order, (0, LAST), strict=True):
        tokens[:, start : start + 2 * KEYS : 2] = keys
        tokens[:, start + 1 : start + 2 * KEYS : 2] = values.gather(1, keys)
    inputs, targets = tokens[:, :-1], torch.full_like(tokens[:, 1:], IGNORED)
    asked = slice(LAST, LAST + 2 * KEYS, 2)
    targets[:, asked] = tokens[:, 1:][:, asked]
    return inputs, targets


@torch.no_grad()
def accuracy(model: RWKV7, mode: str, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of answers that are the likeliest value, read as the model was trained."""
    _, state = model(inputs[:, :LAST])
    logits, _ = model(inputs[:, LAST:], None if mode == "off" else state)
    asked = targets[:, LAST:] != IGNORED
    return (logits.argmax(-1) == targets[:, LAST:])[asked].float().mean().item()


def train(mode: str, steps: int) -> list[tuple[int, float]]:
    """(step, accuracy on sequences never trained on) along a training in the mode."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    unseen = sequences(64, generator)
    model = RWKV7(ModelConfig.from_sizes(vocab_size=VOCABULARY, width=32, layers=1, head_size=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0)
    curve = [(0, accuracy(model, mode, *unseen))]
    for step in range(1, steps + 1):
        inputs, targets = sequences(16, generator)
        optimizer.zero_grad()
        sequence_gradients(model, inputs, targets, window=WINDOW, mode=mode)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps:
            curve.append((step, accuracy(model, mode, *unseen)))
    return curve


def main(steps: int = 250, image: Path = Path("recall_across_windows.png")) -> None:
    """Train all three ways, print the accuracies beside chance, and draw them."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for mode, name in MODES.items():
        curve = train(mode, steps)
        print(f"{name:30} {curve[-1][1]:.1%} of the answers right after {steps} steps")
        axes.plot(*zip(*curve, strict=True), label=name)
    print(f"{'chance':30} {1 / VALUES:.1%}")
    axes.axhline(1 / VALUES, color="0.6", linestyle="--", label="chance")
    axes.set(xlabel="step", ylabel="answers right", ylim=(0, 1.02))
    axes.set_title(f"asked {WINDOWS - 1} windows of {WINDOW} tokens later")
    axes.legend()
    figure.savefig(image, dpi=120)
    print(f"the plot is {image}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
