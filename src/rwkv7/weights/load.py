"""`load_model`: from a checkpoint on disk to a model that no longer needs it.

One copy of the weights is made, and of the file no more than a few per cent is in memory beside it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rwkv7.machine import device_called
from rwkv7.nn import RWKV7

from .official import DTYPES, names_of_dtypes
from .source import Weights, all_finite, open_weights

_PIECE = 8 << 20  # bytes read before their pages are given back; more for very large files


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RWKV7:
    """A model from a checkpoint with official or FLA's names. Nothing in the file is executed.

    Args:
        path: a .pth or .safetensors file; a Hugging Face folder of flash-linear-attention's RWKV-7
            (model.safetensors or pytorch_model.bin, whole or in shards); or a folder that
            `rwkv7 train` wrote, whose newest whole checkpoint is taken.
        device: where the model shall live; None means torch's default.
        dtype: of all parameters; None keeps the file's.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a device that is not to be had, a dtype that no model has; or the file is
            truncated, of another generation of RWKV, or not a model, its tensors do not fit
            together, or a number in them is NaN or infinite.
    """
    device = torch.get_default_device() if device is None else device_called(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected {names_of_dtypes()}, found {dtype}")
    with open_weights(path) as weights:
        try:
            config = weights.config()
            model = RWKV7(config, dtype or weights["emb.weight"].dtype, "meta")
            loaded = _copied(weights, model, device)
        except ValueError as error:
            raise ValueError(f"{weights.path}: {error}") from None
    model.load_state_dict(loaded, assign=True)
    return model


def _copied(weights: Weights, model: RWKV7, device: torch.device) -> dict[str, Tensor]:
    """Each parameter, copied: a mapped file may change under a view of it."""
    parameters = dict(model.named_parameters())
    total = sum(x.nbytes for x in parameters.values())
    loaded, finite, read = {}, {}, 0
    # The largest come first, so that none of them is there twice when all the others are there.
    for name, parameter in sorted(parameters.items(), key=lambda pair: -pair[1].numel()):
        x = weights[name]
        read += x.nbytes
        x = x.to(device=device, dtype=parameter.dtype, copy=True)
        loaded[name] = x = x.reshape(parameter.shape).contiguous()
        finite[name] = all_finite(x)
        if read > max(_PIECE, total // 32):
            weights.release()
            read = 0
    for name, fine in zip(finite, torch.stack(list(finite.values())).tolist(), strict=True):
        if not fine:
            raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    return loaded
