"""The settings of a training run: what `training.json` keeps and `--resume` holds a run to.

Each field's `help` is also the text of its command line option. Where the text comes from, where
the run is written and on which device it runs are not settings: they may change on resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rwkv7.config import ModelConfig
from rwkv7.nn import RECOMPUTE
from rwkv7.tokenizer import get_tokenizer, tokenizer_of

from .carry import CARRY_MODES
from .data import ON_BAD

__all__ = ["FREE_ON_RESUME", "TrainSettings", "resumed_settings", "tuning_settings"]

# Changing these changes what is saved or measured, never a parameter of the model.
FREE_ON_RESUME = (
    *("save_every", "eval_every", "eval_tokens", "recompute", "parallel"),
    *("sample_every", "sample_prompt", "tensorboard"),
)
DTYPES = ("auto", "fp32", "bf16")
PARALLEL = ("ddp", "fsdp")
ORDERS = ("shuffled", "official")
# What of a model is trained, and the learning rates, highest and last, where none are given. Those
# of states are RWKV-LM's own; states need a far higher one than weights.
TUNING_RATES = {"full": (1e-5, 1e-5), "state": (1.0, 0.01), "lora": (1e-4, 1e-5)}


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
    key: str = _option("text", "key (JSON lines) or column (Parquet, Arrow) that holds the text")
    on_bad: str = _option("stop", 'a record that cannot be read: "stop", or "skip" and count it')
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
    recompute: str = _option(
        "nothing",
        'computed again going back instead of kept, the same gradients in less memory: "nothing", '
        'what is "cheap" (all between matrix products and operator), or whole "layers"',
    )
    parallel: str = _option(
        "ddp",
        'with torchrun: each card holds all of the model ("ddp"), or a part of everything ("fsdp")',
    )
    chat: bool = _option(
        False, "the text is JSON lines of conversations, of which what the assistant says is learnt"
    )
    lr: float = _option(
        1e-3, "highest learning rate (with --from 1e-5, for lora 1e-4, for state 1)"
    )
    lr_final: float = _option(
        1e-4,
        "learning rate that the last steps come down to (with --from 1e-5, for state 0.01, "
        "never above lr)",
    )
    warmup: int = _option(10, "steps over which the learning rate rises")
    weight_decay: float = _option(0.1, "weight decay of the matrices; nothing else decays")
    tune: str = _option(
        "full",
        'what of a model given by --from is trained: "full", "state" (the states that texts '
        'begin with) or "lora" (low-rank additions; needs the extra "peft")',
    )
    lora_rank: int = _option(16, "rank of the additions to each matrix")
    lora_alpha: float = _option(32.0, "the additions count alpha / rank times")
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

    sample_every: int = _option(0, "steps between texts that the model writes; 0: none")
    sample_prompt: str = _option("", "what such a text begins with")
    tensorboard: bool = _option(
        False, 'write for TensorBoard, too, in RUN/tensorboard (needs the extra "tensorboard")'
    )

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "width", "head_size", "batch", "window", "lora_rank"):
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
        self._require("sample_every", self.sample_every >= 0, "at least 0")
        prompt = self.sample_prompt.encode("utf-8", "replace").decode() == self.sample_prompt
        self._require("sample_prompt", prompt, "text that can be written as UTF-8")
        begun = not self.sample_prompt or self.sample_every > 0
        self._require("sample_prompt", begun, "sample_every beside it, above 0")
        self._require("seed", -(2**63) <= self.seed < 2**63, "a whole number of 64 bits")
        self._require("clip", self.clip > 0, "above 0 (inf: never clip)")
        self._require("held_out", self.held_out is None or self.held_out >= 0, "at least 0")
        self._require("on_bad", self.on_bad in ON_BAD, f"one of {', '.join(ON_BAD)}")
        self._require("order", self.order in ORDERS, f"one of {', '.join(ORDERS)}")
        self._require("order", not self.chat or self.order == "shuffled", "shuffled with chat")
        self._require("recompute", self.recompute in RECOMPUTE, f"one of {', '.join(RECOMPUTE)}")
        self._require("parallel", self.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}")
        self._require("tune", self.tune in TUNING_RATES, f"one of {', '.join(TUNING_RATES)}")
        self._require("lora_alpha", 0 < self.lora_alpha < math.inf, "above 0")
        for name in () if self.tune == "lora" else ("lora_rank", "lora_alpha"):
            unsaid = getattr(self, name) == TrainSettings.__dataclass_fields__[name].default
            self._require(name, unsaid, f'nothing with tune "{self.tune}"')
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


def tuning_settings(given: Mapping[str, Any], config: ModelConfig) -> TrainSettings:
    """The settings with which a model of these sizes is trained on: `given`, sizes, and rates.

    Args:
        given: settings by name. Sizes need not be among them; a tokenizer that is not is chosen
            by the size of the vocabulary, learning rates by what is tuned (`TUNING_RATES`).
        config: of the model.

    Raises ValueError for a size that is not the model's and a tokenizer with too many tokens.
    """
    tune = given.get("tune", "full")
    sizes = {"layers": config.layers, "width": config.width, "head_size": config.head_size}
    for name, size in sizes.items():
        if given.get(name, size) != size:
            raise ValueError(
                f"{name}: the model to go on from has {size}, found {given[name]}; leave it out"
            )
    if "tokenizer" in given:
        tokenizer = get_tokenizer(given["tokenizer"])
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"tokenizer: {tokenizer.name!r} has {tokenizer.vocab_size} tokens, the model to "
                f"go on from {config.vocab_size}; choose another"
            )
    else:
        tokenizer = tokenizer_of(config.vocab_size)
    lr, lr_final = TUNING_RATES.get(tune, (1e-3, 1e-4))
    lr = given.get("lr", lr)
    rates = {"lr": lr, "lr_final": min(lr, lr_final)}
    return TrainSettings.from_dict({**sizes, "tokenizer": tokenizer.name, **rates, **given})


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
