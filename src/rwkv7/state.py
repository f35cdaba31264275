"""All that a model carries from token to token, and how foreign layouts become ours.

One layout, [B, H, V, K] (rows: value channels), everywhere. Who keeps a state, and for how long,
is the caller's affair: a model takes one and gives one.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .files import WRAPPERS, json_object, open_tensors, write_atomically

_TUNED = re.compile(rf"({WRAPPERS})blocks\.\d+\.att\.time_state")
# What a state file says of itself. The version rises when older readers would misread it.
_FORMAT = {"kind": "rwkv7 state", "version": "1", "layout": "B, H, V, K"}


class LayerState(NamedTuple):
    """One layer's state for B sequences."""

    wkv: Tensor  # [B, H, V, K], float32 (float64 in a float64 model)
    time_shift: Tensor  # [B, C], the last input of time mix, in the model's dtype
    channel_shift: Tensor  # [B, C], the last input of channel mix, in the model's dtype


@dataclass(frozen=True, slots=True)
class ModelState:
    """The state of every layer for B sequences. The value residual is not part of it."""

    layers: tuple[LayerState, ...]

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.layers[0].wkv.shape[0]

    @staticmethod
    def zeros(
        config: ModelConfig,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> ModelState:
        """The state before the first token, of `batch` sequences, for a model of this dtype.

        ValueError for a batch below 0 and for a dtype that is not floating point.
        """
        if batch < 0:
            raise ValueError(f"batch: expected 0 or more sequences, found {batch}")
        _check_floating(dtype)

        def layer() -> LayerState:
            shape = (batch, config.heads, config.head_size, config.head_size)
            wkv = torch.zeros(shape, dtype=wide_dtype(dtype), device=device)
            shift = torch.zeros(batch, config.width, dtype=dtype, device=device)
            return LayerState(wkv, shift, shift.clone())

        return ModelState(tuple(layer() for _ in range(config.layers)))

    def clone(self) -> ModelState:
        """A copy that shares no memory."""
        return self._map(Tensor.clone)

    def detach(self) -> ModelState:
        """The same numbers, cut from the graph that made them."""
        return self._map(Tensor.detach)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """On another device, or for a model of another dtype.

        The WKV states stay float32 whatever the model's dtype, float64 for a float64 model.
        ValueError for a dtype that is not floating point.
        """
        if dtype is not None:
            _check_floating(dtype)
        wkv_dtype = None if dtype is None else wide_dtype(dtype)
        return ModelState(
            tuple(
                LayerState(
                    layer.wkv.to(device, wkv_dtype),
                    layer.time_shift.to(device, dtype),
                    layer.channel_shift.to(device, dtype),
                )
                for layer in self.layers
            )
        )

    def select(self, rows: Tensor | Sequence[int]) -> ModelState:
        """The states of some sequences, in the order of `rows`; a row may come more than once.

        Raises:
            TypeError: rows that are not whole numbers, such as a mask.
            ValueError: a row outside 0 to B - 1; of rows on a GPU, it is torch that complains.
        """
        index = _row_numbers(rows)
        if index.device.type == "cpu" and index.numel():
            low, high = (int(x) for x in index.aminmax())
            if low < 0 or high >= self.batch:
                wrong = low if low < 0 else high
                raise ValueError(f"rows: expected 0 to {self.batch - 1}, found {wrong}")
        index = index.to(self.layers[0].wkv.device)
        return self._map(lambda x: x.index_select(0, index))

    @staticmethod
    def cat(states: Sequence[ModelState]) -> ModelState:
        """One state for the sequences of all `states`, in their order."""
        if not states:
            raise ValueError("states: expected at least one, found none")
        depths = sorted({len(state.layers) for state in states})
        if len(depths) > 1:
            raise ValueError(f"states: expected one number of layers, found {depths}")
        by_layer = zip(*(state.layers for state in states), strict=True)
        return ModelState(
            tuple(
                LayerState(*(torch.cat(parts) for parts in zip(*layers, strict=True)))
                for layers in by_layer
            )
        )

    def check(
        self, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raise ValueError or TypeError, saying what differs, unless it fits this model's call."""
        if len(self.layers) != config.layers:
            raise ValueError(
                f"state: expected {config.layers} layers, found {len(self.layers)}; "
                "it belongs to another model"
            )
        H, N, C = config.heads, config.head_size, config.width
        expected = LayerState((batch, H, N, N), (batch, C), (batch, C))  # type: ignore[arg-type]
        dtypes = (wide_dtype(dtype), dtype, dtype)
        for i, layer in enumerate(self.layers):
            for name, x, shape, kind in zip(
                LayerState._fields, layer, expected, dtypes, strict=True
            ):
                where = f"state.layers[{i}].{name}"
                if x.shape != shape:
                    raise ValueError(
                        f"{where}: expected {list(shape)} for {batch} sequences of this model, "
                        f"found {list(x.shape)}"
                    )
                if x.dtype != kind:
                    raise TypeError(
                        f"{where}: expected {kind} for a model in {dtype}, found {x.dtype}; "
                        "state.to(dtype=the model's) converts it"
                    )
                if x.device != device:
                    raise ValueError(
                        f"{where}: expected the device of the model, {device}, found {x.device}"
                    )

    def to_tensors(self, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Named copies on the CPU, and the texts that let `from_tensors` refuse a wrong file.

        For files that hold a state beside other things; `save` writes one of a state alone.
        """
        tensors = {
            f"layers.{i}.{name}": x.detach().cpu().clone(memory_format=torch.contiguous_format)
            for i, layer in enumerate(self.layers)
            for name, x in zip(LayerState._fields, layer, strict=True)
        }
        dimensions = json.dumps(_dimensions(config))
        return tensors, {**_FORMAT, "dimensions": dimensions, "digest": _digest(tensors)}

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: ModelConfig
    ) -> ModelState:
        """The inverse of `to_tensors`; ValueError says what does not fit this model, or the digest.

        A file that an earlier release wrote has no digest, and is believed.
        """
        for name, expected in _FORMAT.items():
            if (said := metadata.get(name)) != expected:
                raise ValueError(f"expected a state file with {name} {expected!r}, found {said!r}")
        try:
            found = json_object(metadata.get("dimensions", "{}"))
        except ValueError as error:
            raise ValueError(f"the state's dimensions cannot be read ({error})") from None
        wanted = _dimensions(config)
        if wrong := [
            f"{name} {found.get(name)} (the model's: {size})"
            for name, size in wanted.items()
            if found.get(name) != size
        ]:
            raise ValueError(f"the state belongs to another model: it has {', '.join(wrong)}")
        names = [[f"layers.{i}.{n}" for n in LayerState._fields] for i in range(config.layers)]
        if missing := [name for layer in names for name in layer if name not in tensors]:
            raise ValueError(f"the state lacks {missing[0]}")
        state = ModelState(tuple(LayerState(*(tensors[n] for n in layer)) for layer in names))
        shift = state.layers[0].time_shift
        if shift.dim() != 2:
            raise ValueError(f"{names[0][1]}: expected [B, C], found {list(shift.shape)}")
        _check_floating(shift.dtype)
        state.check(config, shift.shape[0], shift.dtype, shift.device)
        chosen = {name: tensors[name] for layer in names for name in layer}
        if metadata.get("digest", digest := _digest(chosen)) != digest:
            raise ValueError("its numbers are not those that were saved: the file is damaged")
        return state

    def save(self, path: str | os.PathLike[str], config: ModelConfig) -> None:
        """Write the state of a model with this config as .safetensors, atomically."""
        path = _safetensors(path)
        tensors, metadata = self.to_tensors(config)
        write_atomically(path, lambda file: save_file(tensors, file, metadata))

    @staticmethod
    def load(path: str | os.PathLike[str], config: ModelConfig) -> ModelState:
        """Read what `save` wrote, onto the CPU, in the dtype it was saved in.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, not a state, of another format version or layout, or of
                a model with other dimensions; the message says which.
        """
        with open_tensors(_safetensors(path)) as tensors:
            try:
                return ModelState.from_tensors(tensors, tensors.metadata, config)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from None

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        return ModelState(tuple(LayerState(*map(change, layer)) for layer in self.layers))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of WKV states and of normalisations: float64 stays, every other gives float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_tuned(
    path: str | os.PathLike[str], config: ModelConfig, dtype: torch.dtype = torch.float32
) -> ModelState:
    """The state of one sequence from a tuned-state file, to begin a text with.

    Such a file has `blocks.i.att.time_state` [H, V, K] for each layer and nothing else; the
    token shifts begin at zero. What trainers put before names (`_forward_module.`) is passed over.
    Files for RWKV-5 and 6 use the same name for [H, K, V] and cannot be told apart.

    Args:
        path: .pth or .safetensors.
        config: of the model that the state shall serve.
        dtype: that model's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or is not a tuned state of such a model.
    """
    state = ModelState.zeros(config, 1, dtype)
    expected = [_tuned_name(i) for i in range(config.layers)]
    with open_tensors(path) as tensors:
        prefix = next((match[1] for name in tensors if (match := _TUNED.fullmatch(name))), "")
        found = {name.removeprefix(prefix): name for name in sorted(tensors)}
        if set(found) != set(expected) or len(found) < len(tensors):
            odd = sorted(set(tensors) ^ {prefix + name for name in expected})[0]
            raise ValueError(
                f"{path}: expected {expected[0]} to {expected[-1]}, one for each layer of the "
                f"model, and nothing else; {odd} is {'too much' if odd in tensors else 'missing'}"
            )
        for name, layer in zip(expected, state.layers, strict=True):
            x, shape = tensors[found[name]], layer.wkv.shape[1:]
            if x.shape != shape:
                raise ValueError(
                    f"{path}: {name}: expected [H, V, K] = {list(shape)}, found {list(x.shape)}"
                )
            if x.layout != torch.strided or not x.is_floating_point():
                raise ValueError(
                    f"{path}: {name}: expected a dense tensor of floating point numbers, "
                    f"found {x.layout}, {x.dtype}"
                )
            if not bool(x.isfinite().all()):
                raise ValueError(f"{path}: {name}: expected numbers, found NaN or infinities")
            layer.wkv.copy_(x)
    return state


def save_tuned(state: ModelState, path: str | os.PathLike[str]) -> None:
    """Write one sequence's WKV states as a tuned-state file (.pth or .safetensors), atomically.

    Raises:
        ValueError: more than one sequence, token shifts that are not zero (the format has no
            place for them), or another suffix.
    """
    path = Path(path)
    if state.batch != 1:
        raise ValueError(f"state: expected one sequence, found {state.batch}; select one")
    if any(bool(shift.any()) for layer in state.layers for shift in layer[1:]):
        raise ValueError(
            "state: expected token shifts of zero, which is where a tuned state begins; a state "
            "in the middle of a text is kept with state.save"
        )
    tensors = {
        _tuned_name(i): layer.wkv[0].detach().cpu().clone(memory_format=torch.contiguous_format)
        for i, layer in enumerate(state.layers)
    }
    if path.suffix == ".pth":
        write_atomically(path, lambda file: torch.save(tensors, file))
    else:
        write_atomically(_safetensors(path), lambda file: save_file(tensors, file))


def state_from_fla(state: Tensor) -> Tensor:
    """A state of flash-linear-attention, [..., K, V], in this library's layout, [..., V, K].

    The result is a contiguous copy; gradients flow through.
    """
    return _transposed(state)


def state_to_fla(state: Tensor) -> Tensor:
    """A state of this library, [..., V, K], in flash-linear-attention's layout, [..., K, V].

    The result is a contiguous copy; gradients flow through.
    """
    return _transposed(state)


def state_from_official(state: Tensor) -> Tensor:
    """A state of the official RWKV-7 kernels, [..., V, K]: already this library's layout.

    Returns its argument; it is there so that code says which layout it means.
    """
    return state


def state_to_official(state: Tensor) -> Tensor:
    """The inverse of `state_from_official`, the identity too."""
    return state


def _check_floating(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating point one, found {dtype}")


def _row_numbers(rows: Tensor | Sequence[int]) -> Tensor:
    if not isinstance(rows, Tensor):
        if any(isinstance(row, bool) or not hasattr(row, "__index__") for row in rows):
            raise TypeError(f"rows: expected whole numbers, found {list(rows)}")
        return torch.tensor([operator.index(row) for row in rows], dtype=torch.long)
    if rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"rows: expected whole numbers, found a tensor of {rows.dtype}")
    return rows.long()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dimensions(config: ModelConfig) -> dict[str, int]:
    return {
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "head_size": config.head_size,
    }


def _safetensors(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name in .safetensors, found {path.name}")
    return path


def _tuned_name(layer: int) -> str:
    return f"blocks.{layer}.att.time_state"


def _transposed(state: Tensor) -> Tensor:
    if state.dim() < 2:
        raise ValueError(f"state: expected [..., H, K, V] or alike, found {list(state.shape)}")
    return state.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
