"""Run the `rwkv` package on model.pth and given.safetensors in a folder; write found.safetensors.

A program of its own: its caller sets the environment that the package reads when imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# The package keeps a flat list of three tensors a layer, in this order.
_PARTS = ("time_shift", "wkv", "channel_shift")


def main(folder: Path) -> None:
    """Every initial state, whole and token by token, through the package in float32."""
    from rwkv.model import RWKV

    given = load_file(folder / "given.safetensors")
    tokens = given["tokens"].tolist()
    model: Any = RWKV(model=str(folder / "model"), strategy="cpu fp32")
    found: dict[str, Tensor] = {}
    for kind in ("none", "zero", "random"):
        logits, state = model.forward(tokens, _state(given, kind), full_output=True)
        found |= _named(f"sequence.{kind}", logits, state)
        steps, state = [], _state(given, kind)
        for token in tokens:
            logits, state = model.forward([token], state)
            steps.append(logits.clone())
        found |= _named(f"token by token.{kind}", torch.stack(steps), state)
    save_file(found, folder / "found.safetensors")


def _state(given: dict[str, Tensor], kind: str) -> list[Tensor] | None:
    if f"{kind}.wkv" not in given:
        return None
    layers = given[f"{kind}.wkv"].shape[0]
    # Copies: the package changes states in place.
    return [given[f"{kind}.{part}"][i].clone() for i in range(layers) for part in _PARTS]


def _named(prefix: str, logits: Tensor, state: list[Tensor]) -> dict[str, Tensor]:
    parts = {part: torch.stack(state[i::3]) for i, part in enumerate(_PARTS)}
    return {f"{prefix}.{name}": x for name, x in {"logits": logits, **parts}.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
