"""`save_model` and `convert`: checkpoints in official files or as a Hugging Face folder.

The path's suffix says which. Numbers and dtypes are those given, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rwkv7.config import ModelConfig
from rwkv7.files import (
    check_destination,
    check_folder,
    write_atomically,
    write_folder_atomically,
)
from rwkv7.nn import RWKV7

from . import fla
from .official import DTYPES, UNUSED, names_of_dtypes, official_shape, unused_shapes
from .source import all_finite, open_weights

# A suffix such as that of "rwkv7-0.4b" is part of a folder's name; ".bin" is not.
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")


def save_model(
    model: RWKV7, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the weights in the model's dtype, atomically.

    Official files get block 0's value residual, which no RWKV-7 uses, as zeros: the official
    trainer loads none without it.

    Args:
        model: its tensors may live anywhere.
        path: ends in .safetensors or .pth, for official names and shapes; without a suffix it is a
            new folder for a Hugging Face model in flash-linear-attention's names. The folder that
            it is in exists.
        metadata: texts to keep in a .safetensors file; a .pth has no place for them.

    Raises:
        ValueError: another suffix, or metadata for a .pth.
        OSError: a full disk and its like, or a folder with something in it; what was there before
            is still whole.
    """
    path = Path(path)
    if metadata and path.suffix == ".pth":
        raise ValueError("metadata: a .pth file holds none; save a .safetensors file")
    _check_path(path)
    tensors = {name: x.detach() for name, x in model.named_parameters()}
    _write(path, tensors, model.config, metadata or {})


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
) -> ModelConfig:
    """Write the checkpoint `source`, all that `load_model` takes, as `save_model` would.

    Every tensor keeps its bits and its own dtype, block 0's unused ones too (a Hugging Face folder
    has no place for those), and the metadata of a .safetensors file go along.

    Args:
        source: a file or folder.
        destination: as `save_model`'s path.
        dtype: of all tensors; None keeps each one's.

    Returns:
        The sizes of the model.

    Raises:
        ValueError, OSError: what `load_model` says of the source, `save_model` of the destination;
            and a number that the dtype cannot hold.
    """
    path = Path(destination)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected {names_of_dtypes()}, found {dtype}")
    _check_path(path)
    with open_weights(source) as weights:
        try:
            config = weights.config()
            tensors = {name: _converted(name, x, dtype) for name, x in weights.items()}
        except ValueError as error:
            raise ValueError(f"{weights.path}: {error}") from None
        metadata = {} if path.suffix == ".pth" else weights.metadata
        _write(path, tensors, config, metadata)
    return config


def _converted(name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not all_finite(x):
        raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    if dtype is None:
        return x
    x = x.to(dtype)
    if not all_finite(x):
        raise ValueError(f"dtype: {dtype} cannot hold the numbers of {name}")
    return x


def _check_path(path: Path) -> None:
    """Raise before the work what would be raised after it."""
    if path.suffix in (".safetensors", ".pth"):
        check_destination(path)
    elif _FILE_SUFFIX.fullmatch(path.suffix) and not path.is_dir():
        raise ValueError(
            f"path: expected a name in .safetensors or .pth, or a folder's without a suffix, "
            f"found {path.name}"
        )
    else:
        check_folder(path)


def _write(
    path: Path, tensors: dict[str, Tensor], config: ModelConfig, metadata: Mapping[str, str]
) -> None:
    texts = {**metadata, "format": "pt"}
    if path.suffix == ".safetensors":
        official = _official(tensors, config)
        write_atomically(path, lambda file: save_file(official, file, texts))
    elif path.suffix == ".pth":
        official = _official(tensors, config)
        write_atomically(path, lambda file: torch.save(official, file))
    else:
        pairs = (fla.fla_tensor(name, x) for name, x in tensors.items() if name not in UNUSED)
        theirs = _separate(dict(pairs))
        about = json.dumps(fla.fla_config(config, tensors["emb.weight"].dtype), indent=2) + "\n"

        def fill(folder: Path) -> None:
            save_file(theirs, folder / "model.safetensors", texts)
            (folder / "config.json").write_text(about, encoding="utf-8")

        write_folder_atomically(path, fill)


def _official(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    like = tensors["emb.weight"]
    zeros = {
        name: like.new_zeros(shape)
        for name, shape in unused_shapes(config).items()
        if name not in tensors
    }
    shaped = {}
    for name, x in (tensors | zeros).items():
        plain = [x.numel()] if x.dim() == 3 else list(x.shape)
        shaped[name] = x.reshape(official_shape(name, plain))
    return _separate(shaped)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and each in memory of its own: files hold none that share."""
    seen: set[int] = set()
    separate = {}
    for name, x in tensors.items():
        storage = x.untyped_storage()
        shares = storage.data_ptr() in seen or storage.nbytes() != x.nbytes
        separate[name] = x = x.clone() if shares else x
        separate[name] = x = x.contiguous()
        seen.add(x.untyped_storage().data_ptr())
    return separate
