"""Checkpoints under the official names: reading them, refusing what is not one, writing them.

Optimizer and progress live elsewhere (`training.checkpoint`); states are in `state`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .files import open_tensors, write_atomically
from .machine import device_called
from .nn import RWKV7

# What a name says about a file that is not plain RWKV-7; the first that matches decides.
_FOREIGN = (
    (".att.time_maa_x", "RWKV-6"),
    (".att.time_decay", "RWKV-4, 5 or 6"),
    ("blocks.0.qkv.", "RWKV-7b (DeepEmbed and DEA)"),
    ("blocks.0.ffn.s_emb.", "RWKV-7a (DeepEmbed)"),
    ("blocks.0.ffn.enn.", "RWKV-8"),
)
_VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PREFIX = "_forward_module."  # DeepSpeed ZeRO-3 leaves it
_UNUSED = tuple(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RWKV7:
    """A model from a checkpoint with the official names. Nothing in the file is executed.

    Args:
        path: a .pth or .safetensors file; or a folder with model.safetensors in it; or one that
            `rwkv7 train` wrote, whose newest whole checkpoint is taken.
        device: where the model shall live; None means torch's default.
        dtype: of all parameters; None keeps the file's.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a device that is not to be had, a dtype that no model has; or the file is
            truncated, of another version of RWKV, or not a model, or its tensors do not fit
            together.
    """
    device = torch.get_default_device() if device is None else device_called(device)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: expected {_names_of_dtypes()}, found {dtype}")
    file = _find(Path(path))
    with open_tensors(file, _PREFIX) as tensors:
        try:
            config = config_from_tensors(tensors)
            kind = dtype or tensors["emb.weight"].dtype
            model = RWKV7(config, kind, "meta")
            # One tensor at a time, each a copy: a mapped file may change under a view of it.
            loaded = {
                name: tensors[name]
                .to(device=device, dtype=kind, copy=True)
                .reshape(parameter.shape)
                .contiguous()
                for name, parameter in model.named_parameters()
            }
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    model.load_state_dict(loaded, assign=True)
    return model


def save_model(
    model: RWKV7, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the weights under the official names and shapes, in the model's dtype, atomically.

    Block 0's value residual, which no RWKV-7 uses, is written as zeros: the official trainer
    loads no file without it.

    Args:
        model: its tensors may live anywhere.
        path: ends in .safetensors or .pth; its folder exists.
        metadata: texts to keep in a .safetensors file; a .pth has no place for them.

    Raises:
        ValueError: another suffix, or metadata for a .pth.
        OSError: a full disk and its like; a file that was there before is still whole.
    """
    path = Path(path)
    tensors = _official(model)
    if path.suffix == ".safetensors":
        texts = {**(metadata or {}), "format": "pt"}
        write_atomically(path, lambda file: save_file(tensors, file, texts))
    elif path.suffix == ".pth":
        if metadata:
            raise ValueError("metadata: a .pth file holds none; save a .safetensors file")
        write_atomically(path, lambda file: torch.save(tensors, file))
    else:
        raise ValueError(f"path: expected a name in .safetensors or .pth, found {path.name}")


def fingerprint(model: RWKV7) -> str:
    """A digest of some numbers of every parameter, the same on every device.

    Rounded to bfloat16, so that a model read in another dtype is mostly still known as itself.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, parameter in model.named_parameters():
        x = parameter.detach().flatten()
        some = x[:: max(1, x.numel() // 64)][:64].to(torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + some.cpu().numpy().astype("<i2").tobytes())
    return digest.hexdigest()[:32]


def config_from_tensors(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The sizes and ranks that a checkpoint's tensors have; nothing else in it says them.

    Args:
        tensors: official names, in any order.

    Raises:
        ValueError: another version of RWKV by its names, a tensor missing, unknown or of a shape
            that does not go with the others.
    """
    _refuse_foreign(tensors)
    layers = _count_layers(tensors)
    V, C = _matrix(tensors, "emb.weight")
    H, N = _matrix(tensors, "blocks.0.att.r_k")
    if C != H * N:
        raise ValueError(
            f"blocks.0.att.r_k: expected heads and head size that make up the width {C} "
            f"of emb.weight, found {[H, N]}"
        )

    def rank(name: str, layer: int = 0) -> int:
        return _matrix(tensors, f"blocks.{layer}.att.{name}")[1]

    # A model of one layer mixes no values: then any rank does, and the file may have none.
    layer = 1 if layers > 1 else 0
    unused = layers == 1 and "blocks.0.att.v1" not in tensors
    config = ModelConfig(
        vocab_size=V,
        width=C,
        layers=layers,
        head_size=N,
        decay_rank=rank("w1"),
        iclr_rank=rank("a1"),
        value_rank=32 if unused else rank("v1", layer),
        gate_rank=rank("g1"),
    )
    _check_shapes(tensors, config)
    return config


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"path: there is no file or folder {path}")
    if (direct := path / "model.safetensors").is_file():
        return direct
    found = sorted(
        (path / "checkpoints").glob("step-*/model.safetensors"),
        key=lambda file: (len(file.parent.name), file.parent.name),
        reverse=True,
    )
    for file in found:
        try:
            with open_tensors(file):
                return file
        except ValueError as error:
            warnings.warn(f"{error}; taking the checkpoint before it", stacklevel=3)
    raise ValueError(
        f"{path}: expected model.safetensors or checkpoints/step-*/model.safetensors in this "
        f"folder, found {'no whole one' if found else 'neither'}"
    )


def _refuse_foreign(tensors: Mapping[str, Tensor]) -> None:
    for part, version in _FOREIGN:
        for name in tensors:
            if part in name:
                raise ValueError(f"expected an RWKV-7 model, found {version} (it has {name})")
    if any(name.endswith(".att.time_state") for name in tensors) and "emb.weight" not in tensors:
        raise ValueError("a tuned state, not a model; rwkv7.state.load_tuned reads it")
    for name in ("emb.weight", "blocks.0.att.r_k"):
        if name not in tensors:
            some = ", ".join(list(tensors)[:3]) or "no tensors"
            raise ValueError(f"expected an RWKV-7 model, which has {name}; found {some}")


def _count_layers(tensors: Mapping[str, Tensor]) -> int:
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    # Counted, not read off the highest number: one absurd name must not ask for as many layers.
    numbers = {block for block in blocks if block.isascii() and block.isdecimal()}
    for i in range(len(numbers)):
        if str(i) not in numbers:
            raise ValueError(f"blocks.{i}: missing")
    return len(numbers)


def _matrix(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    shape = tensors[name].shape
    if len(shape) != 2:
        raise ValueError(f"{name}: expected a matrix, found the shape {list(shape)}")
    return shape[0], shape[1]


def _check_shapes(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    parameters = dict(RWKV7(config, device="meta").named_parameters())
    for what, names in (
        ("missing", parameters.keys() - tensors.keys()),
        ("unknown to RWKV-7", tensors.keys() - parameters.keys() - set(_UNUSED)),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{', '.join(sorted(names)[:3])}{more}: {what}")
    for name, parameter in parameters.items():
        found, expected = list(tensors[name].shape), list(parameter.shape)
        if found != expected and not (len(expected) == 1 and found == [1, 1, *expected]):
            raise ValueError(
                f"{name}: expected the shape {_official_shape(name, expected)} "
                f"to go with the other tensors, found {found}"
            )
        layout, dtype = tensors[name].layout, tensors[name].dtype
        if layout != torch.strided or dtype not in _DTYPES:
            raise ValueError(
                f"{name}: expected a dense tensor of {_names_of_dtypes()}, found {layout}, {dtype}"
            )


def _names_of_dtypes() -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in _DTYPES]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _official_shape(name: str, shape: list[int]) -> list[int]:
    return [1, 1, *shape] if name.rsplit(".", 1)[-1] in _VECTORS else shape


def _official(model: RWKV7) -> dict[str, Tensor]:
    tensors = {name: x.detach() for name, x in model.named_parameters()}
    config = model.config
    C, D = config.width, config.value_rank
    like = model.emb.weight.detach()
    for name, shape in zip(_UNUSED, ((C,), (C, D), (D, C)), strict=True):
        tensors[name] = like.new_zeros(shape)
    return {
        name: x.contiguous().reshape(_official_shape(name, list(x.shape)))
        for name, x in tensors.items()
    }
