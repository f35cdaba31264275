"""What a backward pass reads and is cheap to make: made again there from less, instead of kept.

The modules name what is cheap (`again`); whether it is kept is decided around them (`recomputing`).
It goes through autograd's hooks for saved tensors, so that no operation runs another way forwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


def again(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """function(*inputs). Inside `recomputing` its outputs are not kept for a backward pass.

    `function` gives the same whenever it is called, and holds no tensor of the size of `inputs`.
    """
    outputs = function(*inputs)
    remember(function, inputs, outputs)
    return outputs


def remember(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
) -> None:
    """As `again`, for `outputs` that are there already and that function(*inputs) would give."""
    recipes = None if torch.compiler.is_compiling() else _recipes.get()
    if recipes is not None:
        recipes.note(function, inputs, outputs)


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, a graph keeps the inputs of what goes through `again`, and makes the rest from them.

    The gradients are the same bit for bit. Not for a graph that `torch.compile` makes.
    """
    recipes = _Recipes()
    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, _unpack):
            yield
    finally:
        _recipes.reset(token)


class _Recipe:
    """How some tensors are made. It lives as long as a graph may ask for one of them."""

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: list[Any], device: str
    ) -> None:
        self._function, self._inputs = function, inputs
        self._outputs: tuple[Tensor, ...] | None = None
        on = torch.is_autocast_enabled(device)
        self._precision = device, torch.get_autocast_dtype(device) if on else None

    def output(self, index: int) -> Tensor:
        """Made when first asked for; all who ask share it."""
        if self._outputs is None:
            device, dtype = self._precision
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
                self._outputs = self._function(*map(_unpack, self._inputs))
            self._inputs = []
        return self._outputs[index]


class _Made:
    """A saved tensor that is not kept: an output of a recipe, in a shape of its own."""

    def __init__(self, recipe: _Recipe, index: int, shape: torch.Size) -> None:
        self._recipe, self._index, self._shape = recipe, index, shape

    def again(self) -> Tensor:
        return self._recipe.output(self._index).view(self._shape)


class _Recipes:
    """The recipes of what one forward pass made, found by where a tensor lies."""

    def __init__(self) -> None:
        # An address tells of a tensor as long as that tensor lives.
        self._made: dict[int, tuple[weakref.ref[Tensor], _Recipe, int]] = {}

    def note(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor | None, ...],
        outputs: tuple[Tensor, ...],
    ) -> None:
        packed = [None if x is None else self.pack(x) for x in inputs]
        recipe = _Recipe(function, packed, outputs[0].device.type)
        for index, x in enumerate(outputs):
            if x.numel():
                self._made[x.data_ptr()] = weakref.ref(x), recipe, index

    def pack(self, x: Tensor) -> Any:
        """What a graph keeps of x: x, or how it is made."""
        if x.data_ptr() in self._made:
            alive, recipe, index = self._made[x.data_ptr()]
            made = alive()
            if made is not None and _differ_in_shape_alone(made, x):
                return _Made(recipe, index, x.shape)
        return x.detach()


def _differ_in_shape_alone(x: Tensor, y: Tensor) -> bool:
    contiguous = x.is_contiguous() and y.is_contiguous()
    return contiguous and x.dtype == y.dtype and x.numel() == y.numel()


def _unpack(packed: Any) -> Any:
    return packed.again() if isinstance(packed, _Made) else packed


_recipes: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)
