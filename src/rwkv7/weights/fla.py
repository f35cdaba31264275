"""RWKV-7 under the names of flash-linear-attention's Hugging Face model, both ways.

There the low-rank matrices are nn.Linear's, transposed against the official files, and their
biases are w0, a0 and v0. Source: flash-linear-attention, fla/models/rwkv7 and fla/layers/rwkv7.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv7.config import ModelConfig

EMBEDDINGS = "model.embeddings.weight"
_MODULES = {
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.ln_x": "attn.g_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "ffn.key": "ffn.key",
    "ffn.value": "ffn.value",
}
_MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_OUTSIDE = {
    "emb.weight": EMBEDDINGS,
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
# Within a block, by official name. `_TRANSPOSED` are the matrices that lie the other way there.
_INSIDE = (
    {f"{a}.{end}": f"{b}.{end}" for a, b in _MODULES.items() for end in ("weight", "bias")}
    | {f"att.{name}": f"attn.{name}" for name in (*_MIXES, "k_k", "k_a", "r_k")}
    | {f"att.{letter}0": f"attn.{letter}_lora.lora.2.bias" for letter in "wav"}
    | {f"att.{letter}1": f"attn.{letter}_lora.lora.0.weight" for letter in "wavg"}
    | {f"att.{letter}2": f"attn.{letter}_lora.lora.2.weight" for letter in "wavg"}
    | {"ffn.x_k": "ffn.x_k"}
)
_TRANSPOSED = {f"att.{letter}{number}" for letter in "wavg" for number in "12"}
_OFFICIAL = {theirs: ours for ours, theirs in _INSIDE.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.ASCII)
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)", re.ASCII)

# What config.json must say where it says anything: these change the arithmetic.
_FIXED = {
    "model_type": "rwkv7",
    "hidden_act": "sqrelu",
    "norm_first": True,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "attn": None,
}


def official_reads(names: Collection[str], tied: bool) -> dict[str, tuple[str, Callable]]:
    """For each official name, the name there to read and what makes it ours.

    Args:
        names: of FLA's tensors, without prefixes. One that it does not have keeps its own name.
        tied: whether the head is the embedding when it is not among the names.
    """
    reads: dict[str, tuple[str, Callable]] = {}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match and match[2] == "attn.x_x":  # FLA's first version: the six mixes in one
            for row, mix in enumerate(_MIXES):
                reads[f"blocks.{match[1]}.att.{mix}"] = name, _row(row)
        elif match and match[2] in _OFFICIAL:
            ours = _OFFICIAL[match[2]]
            reads[f"blocks.{match[1]}.{ours}"] = name, _turned if ours in _TRANSPOSED else _same
        else:
            reads[outside.get(name, name)] = name, _same
    if tied and "head.weight" not in reads and EMBEDDINGS in names:
        reads["head.weight"] = EMBEDDINGS, _same
    return reads


def fla_tensor(name: str, x: Tensor) -> tuple[str, Tensor]:
    """The name and the tensor there of the official tensor `x` called `name`."""
    if name in _OUTSIDE:
        return _OUTSIDE[name], x
    match = _BLOCK.fullmatch(name)
    assert match, name
    layer, ours = match.groups()
    if ours in _TRANSPOSED:
        x = x.T.contiguous()
    elif ours.removeprefix("att.") in _MIXES:
        x = x.reshape(1, 1, -1)
    elif x.dim() == 3:  # the other vectors, [1, 1, C] in official files
        x = x.reshape(-1)
    return f"model.layers.{layer}.{_INSIDE[ours]}", x


def fla_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model of these sizes."""
    # The World vocabulary's id 0 ends a document; of others nothing is known here.
    end = 0 if config.vocab_size == 65536 else None
    return {
        "architectures": ["RWKV7ForCausalLM"],
        **_FIXED,
        **_sizes(config),
        "num_heads": config.heads,
        "hidden_ratio": 4.0,
        "value_dim": [config.width] * config.layers,
        # Its fused norms add another eps (1e-6, inside the root) to the norm of keys.
        "fuse_norm": False,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def check_config(said: Mapping[str, Any], config: ModelConfig | None) -> None:
    """Raise ValueError where config.json says what no plain RWKV-7 is, or what its tensors deny.

    Args:
        said: what config.json holds.
        config: the sizes that the tensors have; None: they are not yet known.
    """
    expected: dict[str, Any] = dict(_FIXED)
    if config is not None:
        expected |= _sizes(config)
        if config.layers == 1:
            del expected["v_low_rank_dim"]  # no tensor tells it
    for key, value in expected.items():
        found = said.get(key)
        if found is not None and found != value:
            raise ValueError(f"config.json: expected {key} {value!r}, found {found!r}")


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.iclr_rank,
        "v_low_rank_dim": config.value_rank,
        "gate_low_rank_dim": config.gate_rank,
    }


def _same(x: Tensor) -> Tensor:
    return x


def _turned(x: Tensor) -> Tensor:
    return x.T if x.dim() == 2 else x


def _row(number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x[number].reshape(-1) if x.dim() > 1 and len(x) == len(_MIXES) else x
