"""The sizes of a model: widths, layers and the ranks of its four low-rank matrices.

Ranks are stored, never recomputed: published checkpoints do not follow the current rule. Reading
them from a file's tensors is left to `weights`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of an RWKV-7 model. ValueError or TypeError names the field that does not fit.

    Letters used elsewhere: V vocabulary, C width, L layers, N head size, H = C / N heads.
    """

    vocab_size: int
    width: int
    layers: int
    head_size: int = 64
    decay_rank: int  # w1 [C, D], w2 [D, C]
    iclr_rank: int  # a1, a2: the in-context learning rate
    value_rank: int  # v1, v2: the value residual, layers 1 and up
    gate_rank: int  # g1, g2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{field.name}: expected an int, found {size!r}")
            if size < 1:
                raise ValueError(f"{field.name}: expected at least 1, found {size}")
        if self.width % self.head_size:
            raise ValueError(
                f"width: expected a multiple of head_size = {self.head_size}, found {self.width}"
            )

    @property
    def heads(self) -> int:
        """H = C / N."""
        return self.width // self.head_size

    @property
    def ffn_size(self) -> int:
        """The hidden width of channel mix, 4C in every RWKV-7."""
        return 4 * self.width

    @classmethod
    def from_sizes(
        cls, *, vocab_size: int, width: int, layers: int, head_size: int = 64
    ) -> ModelConfig:
        """A config for training from scratch, with the ranks that the official trainer chooses.

        Source: RWKV-LM, RWKV-v7/train_temp/src/model.py (D_DECAY_LORA and its neighbours).
        """
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width: expected an int of at least 1, found {width!r}")
        return cls(
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            head_size=head_size,
            decay_rank=_rank(2.5, width),
            iclr_rank=_rank(2.5, width),
            value_rank=_rank(1.7, width),
            gate_rank=_rank(5.0, width),
        )

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The sizes of a published model by its name, one of `PRESETS`."""
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, found {name!r}")
        return PRESETS[name]

    def to_dict(self) -> dict[str, int]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; ValueError names what is missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(sizes) - names):
            raise ValueError(f"sizes: unknown {', '.join(unknown)}; known: {', '.join(names)}")
        if missing := sorted(names - {"head_size"} - set(sizes)):
            raise ValueError(f"sizes: missing {', '.join(missing)}")
        return cls(**sizes)


def _rank(factor: float, width: int) -> int:
    # Python's round, which takes a half to the even side, is part of the rule.
    return max(32, 32 * round(factor * math.sqrt(width) / 32))


def _published(layers: int, width: int, ranks: tuple[int, int, int, int]) -> ModelConfig:
    decay, iclr, value, gate = ranks
    return ModelConfig(
        vocab_size=65536,
        width=width,
        layers=layers,
        decay_rank=decay,
        iclr_rank=iclr,
        value_rank=value,
        gate_rank=gate,
    )


# The World and G1 series. Their ranks follow an older rule than `from_sizes` does (the trainer of
# RWKV-v5: 1.8, 1.3 and 0.6 C^0.8 for the gate), but for the gates of 0.4b and all of 13.3b.
PRESETS: dict[str, ModelConfig] = {
    "0.1b": _published(12, 768, (64, 64, 32, 128)),
    "0.4b": _published(24, 1024, (64, 64, 32, 128)),
    "1.5b": _published(24, 2048, (96, 96, 64, 256)),
    "2.9b": _published(32, 2560, (96, 96, 64, 320)),
    "7.2b": _published(32, 4096, (128, 128, 96, 480)),
    "13.3b": _published(61, 4096, (192, 192, 128, 384)),
}
