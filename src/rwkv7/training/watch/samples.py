"""Short texts that a model writes while it is trained.

They depend on the weights, the prompt and the seed alone, and change nothing in the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rwkv7.files import write_atomically
from rwkv7.nn import RWKV7
from rwkv7.sampling import Sampler
from rwkv7.state import ModelState
from rwkv7.tokenizer import Tokenizer

__all__ = ["SAMPLE_TOKENS", "write_sample", "write_samples"]

SAMPLE_TOKENS = 64
TEMPERATURE, TOP_P = 1.0, 0.7


@torch.no_grad()
def write_sample(
    model: RWKV7,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    seed: int,
    initial: Callable[[int], ModelState | None] | None = None,
    tokens: int = SAMPLE_TOKENS,
    agreed: Callable[[int], int] | None = None,
) -> str:
    """`prompt` and what the model goes on with, at most `tokens` tokens.

    Args:
        model: set to evaluation for the time being.
        prompt: where it is empty, the end of a document comes first, or a new line.
        seed: of the draws.
        initial: gives the state that a text begins with; None means an empty one.
        agreed: told of every draw, gives the one that counts.
    """
    end = tokenizer.end_of_document
    ids = tokenizer.encode(prompt) or ([10] if end is None else [end])
    sampler = Sampler(TEMPERATURE, top_p=TOP_P, seed=seed)
    was_training = model.training
    model.eval()
    try:
        state = initial(1) if initial else None
        fed, drawn = ids, []
        for _ in range(tokens):
            row = torch.tensor([fed], device=model.device)
            logits, state = model(row, state, last_only=True)
            chosen = sampler.sample(logits[0, -1].float())
            drawn.append(agreed(chosen) if agreed else chosen)
            if drawn[-1] == end:
                break
            fed = drawn[-1:]
    finally:
        model.train(was_training)
    return prompt + tokenizer.decode_bytes(drawn).decode(errors="replace")


def write_samples(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the samples among the lines of a log as a text file, atomically."""
    texts = [f"step {line['step']:,}\n{line['sample']}\n" for line in lines if "sample" in line]
    text = ("\n" + "-" * 20 + "\n").join(texts)
    write_atomically(path, lambda file: _write_text(file, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
