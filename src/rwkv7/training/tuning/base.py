"""The model that a run goes on from: read once, and found again, the same, when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rwkv7.fingerprint import fingerprint
from rwkv7.nn import RWKV7
from rwkv7.weights import load_model

__all__ = ["Base", "open_base", "reopen_base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Where the model was, a digest of its weights, and the dtype that they had there."""

    path: str
    weights: str
    dtype: str

    def to_dict(self) -> dict[str, str]:
        """The fields by name, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Base:
        """The inverse of `to_dict`; TypeError for other names."""
        return Base(**values)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights where they were."""
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype: expected the name of one, found {self.dtype!r}")
        return found


def open_base(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[RWKV7, Base]:
    """The model of a checkpoint, or of a run's folder, in `dtype`, and what it is known by.

    Raises what `rwkv7.weights.load_model` raises.
    """
    if not path.exists():
        raise FileNotFoundError(f"from: there is no file or folder {path}")
    model = load_model(path, device=device)
    name = str(model.dtype).removeprefix("torch.")
    base = Base(path=str(path.resolve()), weights=fingerprint(model), dtype=name)
    return model.to(dtype), base


def reopen_base(
    base: Base, device: torch.device, dtype: torch.dtype, elsewhere: Path | None = None
) -> tuple[RWKV7, Base]:
    """The model of `base` again, from where it was or from `elsewhere`, and where it is now.

    Raises ValueError when it is not there, or has become another.
    """
    path = Path(base.path) if elsewhere is None else elsewhere
    try:
        model, found = open_base(path, device, dtype)
    except FileNotFoundError:
        raise ValueError(
            f"from: the model that this run began from is not at {path}; say with --from where "
            "it is now"
        ) from None
    if found.weights != base.weights:
        raise ValueError(
            f"from: {path} holds other weights than those that this run began from; say with "
            "--from where they are now, or begin a new run in another folder"
        )
    return model, found
