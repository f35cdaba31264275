"""What a file or folder is: a checkpoint, a state, a session, an adapter, and what it holds.

Reads, and changes nothing. What may be loaded is decided by `weights` and `state`; here their
verdicts become a description.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import PRESETS, ModelConfig
from .files import json_object, open_tensors
from .weights.generations import is_tuned_state, other_generation
from .weights.source import Weights, all_finite, open_weights

# Vocabularies by their size; "world" and "byte" are this library's names.
_VOCABULARIES = {256: "byte", 65536: "world", 50304: "20B_tokenizer.json (the Pile's)"}
_ADAPTER = "adapter_model.safetensors", "adapter_config.json"
_PIECE = 64 << 20  # bytes looked at before their pages are given back


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What is known of a file or folder.

    Attributes:
        path: of the file that was looked into, or its folder.
        kind: what it is, in words, such as "RWKV-7 checkpoint" or "session".
        facts: sizes, dtypes and whatever else the kind has, as JSON can hold it.
        problem: why it cannot be used as it is, in words; None where nothing is wrong.
    """

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def to_json(self) -> str:
        """The description as one JSON object."""
        return json.dumps(asdict(self), indent=1)


def describe(path: str | os.PathLike[str]) -> Description:
    """What the file or folder at `path` is. Nothing in it is executed.

    A file that cannot be read, or is none of what this library knows, is described too: its
    `problem` says so.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: it may not be read.
    """
    path = Path(path)
    adapter = path / _ADAPTER[0] if path.is_dir() else path
    try:
        if adapter.is_file() and adapter.name == _ADAPTER[0]:
            return _adapter(adapter)
        with open_weights(path) as weights:
            return _described(path, weights)
    except ValueError as error:
        return Description(path=str(path), kind="unreadable", problem=_without(path, error))


def _described(path: Path, weights: Weights) -> Description:
    where = str(weights.path)
    if weights.metadata.get("kind") == "rwkv7 state":
        return _state(where, weights)
    if is_tuned_state(weights):
        return _tuned(where, weights)
    facts: dict[str, Any] = {}
    if path.is_dir() and (steps := [folder.name for folder in path.glob("checkpoints/step-*")]):
        facts["checkpoints"] = sorted(steps, key=lambda name: (len(name), name))
    other = other_generation(weights)
    try:
        config = weights.config()
    except ValueError as error:
        if other is None and "emb.weight" not in weights:
            return _adapter(weights.path) if _is_adapter(weights) else _unknown(where, weights)
        kind = f"{other or 'damaged RWKV-7'} checkpoint"
        return Description(path=where, kind=kind, facts=facts | _all(weights), problem=str(error))
    kind = "run's checkpoint" if facts else "RWKV-7 checkpoint"
    if weights.naming == "fla":
        kind += " in flash-linear-attention's names"
    facts |= _model(config, weights) | _all(weights)
    return Description(path=where, kind=kind, facts=facts, problem=_not_finite(weights))


def _model(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    H, N, C = config.heads, config.head_size, config.width
    size = next((name for name, preset in PRESETS.items() if preset == config), None)
    tokenizer = weights.metadata.get("tokenizer") or _VOCABULARIES.get(config.vocab_size)
    state = config.layers * (4 * H * N * N + 2 * C * weights["emb.weight"].element_size())
    return {
        **({"size": size} if size else {}),
        **config.to_dict(),
        "heads": H,
        "tokenizer": tokenizer or "unknown",
        "state_bytes_per_sequence": state,
    }


def _all(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What can be said of any tensors."""
    found = list(tensors.values())
    dtypes = Counter(str(x.dtype).removeprefix("torch.") for x in found)
    facts: dict[str, Any] = {
        "tensors": len(found),
        "parameters": sum(x.numel() for x in found),
        "bytes": sum(x.nbytes for x in found if x.layout == torch.strided),
        "dtypes": dict(dtypes.most_common()),
    }
    metadata = dict(getattr(tensors, "metadata", {}))
    return facts | ({"metadata": metadata} if metadata else {})


def _state(path: str, weights: Weights) -> Description:
    metadata = weights.metadata
    problem, facts = None, {}
    try:
        facts = dict(json_object(metadata.get("dimensions", "{}")))
        session = json_object(metadata["session"]) if "session" in metadata else None
    except ValueError as error:
        problem, session = f"its metadata cannot be read ({error})", None
    shift = next((x for name, x in weights.items() if name.endswith(".time_shift")), None)
    facts["sequences"] = None if shift is None else shift.shape[0]
    facts["format"] = {key: metadata.get(key) for key in ("version", "layout")}
    kind = "state" if session is None else "session"
    if session is not None:
        facts["session"] = {name: session.get(name) for name in ("token", "ended", "sampler")}
        facts["weights"] = session.get("weights")
    facts |= {key: fact for key, fact in _all(weights).items() if key != "metadata"}
    return Description(path=path, kind=kind, facts=facts, problem=problem or _not_finite(weights))


def _tuned(path: str, weights: Weights) -> Description:
    states = [x for name, x in weights.items() if name.endswith(".att.time_state")]
    shapes = sorted({tuple(x.shape) for x in states})
    facts: dict[str, Any] = {"layers": len(states)} | _all(weights)
    problem = None
    if len(shapes) != 1 or len(shapes[0]) != 3 or len(states) != len(weights):
        problem = f"expected one [H, V, K] a layer and nothing else, found the shapes {shapes}"
    else:
        facts = {"layers": len(states), "heads": shapes[0][0], "head_size": shapes[0][1]} | facts
    return Description(
        path=path, kind="tuned state", facts=facts, problem=problem or _not_finite(weights)
    )


def _adapter(path: Path) -> Description:
    facts: dict[str, Any] = {}
    about = path.parent / _ADAPTER[1]
    if about.is_file():
        said = json_object(about.read_bytes())
        facts = {key: said.get(key) for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    with open_tensors(path) as tensors:
        layers = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
        facts |= {"adapted": len(layers)} | _all(tensors)
        problem = None if layers else "no name in it is that of a LoRA matrix"
        return Description(
            path=str(path),
            kind="LoRA adapter",
            facts=facts,
            problem=problem or _not_finite(tensors),
        )


def _is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    return any(".lora_A" in name for name in tensors)


def _unknown(path: str, weights: Weights) -> Description:
    some = ", ".join(list(weights)[:3]) or "none"
    return Description(
        path=path,
        kind="tensors of another kind",
        facts=_all(weights),
        problem=f"no model, state or adapter that this library knows; its tensors: {some}",
    )


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    bad, read = [], 0
    for name, x in tensors.items():
        if x.is_floating_point() and x.numel() and not all_finite(x):
            bad.append(name)
        read += x.nbytes
        if read > _PIECE and hasattr(tensors, "release"):
            tensors.release()
            read = 0
    if not bad:
        return None
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"NaN or infinity in {', '.join(bad[:3])}{more}"


def _without(path: Path, error: ValueError) -> str:
    """What the error says; the path stands beside it already."""
    return " ".join(str(error).split()).removeprefix(f"{path}: ")


def in_words(value: Any, name: str = "") -> str:
    """A fact for people: bytes with their unit, numbers with separators, lists on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int) and "bytes" in name:
        power = min((max(value, 1).bit_length() - 1) // 10, 4)
        return f"{value / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(inner, key)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(in_words(inner) for inner in value)
    return str(value)
