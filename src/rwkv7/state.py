"""All that a model carries from token to token, and how foreign layouts become ours.

One layout, [B, H, V, K] (rows: value channels), everywhere. Who keeps a state, and for how long,
is the caller's affair: a model takes one and gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig


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
        """The state before the first token, of `batch` sequences, for a model of this dtype."""

        def layer() -> LayerState:
            shape = (batch, config.heads, config.head_size, config.head_size)
            wkv = torch.zeros(shape, dtype=wide_dtype(dtype), device=device)
            shifts = torch.zeros(2, batch, config.width, dtype=dtype, device=device)
            return LayerState(wkv, *shifts)

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
        """
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
        """The states of some sequences, in the order of `rows`; a row may come more than once."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.layers[0].wkv.device)
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

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelState:
        return ModelState(tuple(LayerState(*map(change, layer)) for layer in self.layers))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of WKV states and of normalisations: float64 stays, every other gives float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _transposed(state: Tensor) -> Tensor:
    if state.dim() < 2:
        raise ValueError(f"state: expected [..., H, K, V] or alike, found {list(state.shape)}")
    return state.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
