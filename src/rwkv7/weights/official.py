"""The official checkpoints' names and shapes, and the sizes of a model that follow from them.

What other generations' names look like is left to `generations`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rwkv7.config import ModelConfig
from rwkv7.nn import RWKV7

from .generations import refuse_other

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Block 0's value residual: in some files, with any numbers, and used by no RWKV-7.
UNUSED = tuple(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))
_VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")


def official_shape(name: str, shape: list[int]) -> list[int]:
    """The shape in official files of the parameter `name`, which has `shape` in the model."""
    return [1, 1, *shape] if name.rsplit(".", 1)[-1] in _VECTORS else shape


def unused_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The official shapes of `UNUSED`, which the official trainer loads no file without."""
    C, D = config.width, config.value_rank
    return dict(zip(UNUSED, ([1, 1, C], [C, D], [D, C]), strict=True))


def config_from_tensors(tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The sizes and ranks that a checkpoint's tensors have; nothing else in it says them.

    Args:
        tensors: official names, in any order.

    Raises:
        ValueError: another version of RWKV by its names, a tensor missing, unknown or of a shape
            that does not go with the others.
    """
    refuse_other(tensors)
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


def names_of_dtypes() -> str:
    """The dtypes that a model may have, in words."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    return f"{', '.join(names[:-1])} or {names[-1]}"


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
        ("unknown to RWKV-7", tensors.keys() - parameters.keys() - set(UNUSED)),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{', '.join(sorted(names)[:3])}{more}: {what}")
    for name, parameter in parameters.items():
        x, expected = tensors[name], list(parameter.shape)
        found = list(x.shape)
        if found != expected and not (len(expected) == 1 and found == [1, 1, *expected]):
            raise ValueError(
                f"{name}: expected the shape {official_shape(name, expected)} "
                f"to go with the other tensors, found {found}"
            )
        if x.layout != torch.strided or x.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected a dense tensor of {names_of_dtypes()}, "
                f"found {x.layout}, {x.dtype}"
            )
