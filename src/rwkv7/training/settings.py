"""The settings of a training run: what `training.json` keeps and `--resume` holds a run to.

Each field's `help` is also the text of its command line option. Where the text comes from, where
the run is written and on which device it runs are not settings: they may change on resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .carry import CARRY_MODES

__all__ = ["FREE_ON_RESUME", "TrainSettings", "resumed_settings"]

# Changing these changes what is saved or measured, never a parameter of the model.
FREE_ON_RESUME = ("save_every", "eval_every", "eval_tokens", "checkpoint_layers")
DTYPES = ("auto", "fp32", "bf16")
ORDERS = ("shuffled", "official")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Everything that decides what a run computes. Raises ValueError for what makes no sense.

    The recipe is RWKV-7's own (BlinkDL/RWKV-LM, RWKV-v7/train_temp): AdamW in three groups, a
    cosine schedule, 10 steps of warm-up, gradients clipped to norm 1. The sizes are small.
    """

    steps: int = _option(1000, "optimizer steps; the learning rate falls over all of them")
    layers: int = _option(4, "layers of the model")
    width: int = _option(256, "channels of the model, a multiple of the head size")
    head_size: int = _option(64, "channels of a head")
    tokenizer: str = _option("byte", 'tokenizer: "byte", or "world" (needs the extra "world")')
    batch: int = _option(16, "windows in a step, or sequences with carry")
    window: int = _option(512, "tokens in a window")
    order: str = _option(
        "shuffled", 'of the windows: "shuffled", or "official" (RWKV-LM\'s, the same every epoch)'
    )
    pack: bool = _option(False, "documents apart: no state or token shift leaks into the next one")
    carry: str = _option(
        "off",
        'what goes from window to window of a sequence: "off", the state ("truncated"), or the '
        'state and its gradient ("exact": that of the whole sequence, in the memory of a window)',
    )
    sequence: int | None = _option(
        None, "with carry: tokens of a sequence, read in windows; a step reads whole ones"
    )
    accumulate: int = _option(
        1, "parts a step's batch is worked through in; the gradient stays the whole batch's"
    )
    checkpoint_layers: bool = _option(
        False, "compute layers again going back instead of keeping what is in them: less memory"
    )
    lr: float = _option(1e-3, "highest learning rate")
    lr_final: float = _option(1e-4, "learning rate that the last steps come down to")
    warmup: int = _option(10, "steps over which the learning rate rises")
    weight_decay: float = _option(0.1, "weight decay of the matrices; nothing else decays")
    clip: float = _option(1.0, "largest norm of the whole gradient")
    seed: int = _option(0, "seed of the initial weights and of the order of the windows")
    held_out: int | None = _option(
        None,
        "bytes at the end of the text to keep for evaluation "
        "(default: a tenth of it, at most 256 KiB)",
    )
    dtype: str = _option("auto", '"fp32", "bf16" (products only), or "auto": bf16 on a GPU')
    save_every: int = _option(200, "steps between checkpoints")
    eval_every: int = _option(200, "steps between evaluations")
    eval_tokens: int = _option(
        65536, "held-out tokens that an evaluation on the way reads; the last one reads all"
    )

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "width", "head_size", "batch", "window"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        carries, sequence = self.carry != "off", self.sequence
        self._require("carry", self.carry in CARRY_MODES, f"one of {', '.join(CARRY_MODES)}")
        self._require("sequence", carries or sequence is None, 'nothing with carry "off"')
        self._require(
            "sequence",
            not carries or (sequence is not None and sequence >= 1),
            f'a number of tokens with carry "{self.carry}"',
        )
        self._require(
            "accumulate", 1 <= self.accumulate <= self.batch, f"1 to the batch's {self.batch}"
        )
        cut = self.pack and self.carry == "truncated"
        self._require("accumulate", self.accumulate == 1 or not cut, "1 for packed, truncated text")
        for name in ("save_every", "eval_every", "eval_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("width", self.width % self.head_size == 0, "a multiple of head_size")
        self._require("lr", 0 < self.lr < math.inf, "above 0")
        self._require("lr_final", 0 <= self.lr_final <= self.lr, f"from 0 to lr ({self.lr:g})")
        self._require("warmup", self.warmup >= 0, "at least 0")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        self._require("clip", self.clip > 0, "above 0 (inf: never clip)")
        self._require("held_out", self.held_out is None or self.held_out >= 0, "at least 0")
        self._require("order", self.order in ORDERS, f"one of {', '.join(ORDERS)}")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainSettings:
        """The settings that `to_dict` gave. Raises ValueError for names it does not know."""
        unknown = set(values) - {f.name for f in fields(TrainSettings)}
        if unknown:
            raise ValueError(f"settings: unknown names {', '.join(sorted(unknown))}")
        return TrainSettings(**values)


def resumed_settings(stored: TrainSettings, changes: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run that goes on: the `stored` ones with the allowed `changes`.

    Raises ValueError for a change after which the run would not be the one that was begun.
    """
    # "auto" asks for nothing in particular, so what the run was begun with serves.
    changes = {k: v for k, v in changes.items() if (k, v) != ("dtype", "auto")}
    wanted = TrainSettings.from_dict({**stored.to_dict(), **changes})
    refused = [
        f"{name} (begun with {getattr(stored, name)!r}, asked for {value!r})"
        for name, value in changes.items()
        if name not in FREE_ON_RESUME and value != getattr(stored, name)
    ]
    if refused:
        raise ValueError(
            f"this run cannot go on with another {', '.join(refused)}: the result would be neither "
            "this run nor a new one. Leave it out, or begin a new run in another folder"
        )
    return wanted
