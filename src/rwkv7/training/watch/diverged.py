"""Where a loss that is no number came from: the step is run again and watched, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["earliest", "first_not_finite"]

GRADIENT = "the gradient of"


def first_not_finite(
    model: nn.Module, trained: nn.Module, compute: Callable[[], Tensor]
) -> str | None:
    """Says in words which tensor is the first with NaN or infinity in it; None where none has.

    Args:
        model: its parameters are looked at first, then the outputs of its modules as they come.
        trained: the gradients of its parameters are looked at in the order in which they come.
        compute: the forward and backward pass, which gives the loss; gradients are added to. It may
            raise ValueError on its way, as the operator does at a NaN.
    """
    for name, x in [*model.named_parameters(), *trained.named_parameters()]:
        if not _finite(x):
            return f"the parameter {name}, before the step"
    seen = _Seen()
    with ExitStack() as stack:
        for handle in seen.watch(model, trained):
            stack.callback(handle.remove)
        try:
            loss = compute()
        except ValueError:
            loss = None
    # Of a model that cards share, gradients come without a hook's being told. All cards look.
    wrong = [n for n, x in trained.named_parameters() if x.grad is not None and not _finite(x.grad)]
    if seen.outputs:
        return seen.outputs[0]
    if loss is not None and not _finite(loss):
        return "the loss, of outputs that are all finite"
    if seen.gradients:
        return seen.gradients[0]
    return _gradient_of(wrong[-1]) if wrong else None


@dataclass(slots=True)
class _Seen:
    """What was not finite, in the order in which it was made."""

    outputs: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)

    def watch(self, model: nn.Module, trained: nn.Module) -> Iterator[Any]:
        """Hooks on every module but layer norms, and on every parameter that is trained.

        A layer norm with a hook is run apart from what follows it, which takes more memory; what it
        spoils is seen there.
        """
        for name, module in model.named_modules():
            if type(module) is nn.LayerNorm:
                continue
            yield module.register_forward_hook(self._on_output(name or "the model"))
        for name, x in trained.named_parameters():
            if x.requires_grad:
                yield x.register_hook(self._on_gradient(name))

    def _on_output(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            # A module's hook is called after those of the modules inside it.
            if not self.outputs and not all(map(_finite, _tensors(output))):
                self.outputs.append(f"the output of {name} (forward pass)")

        return look

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if not self.gradients and not _finite(gradient):
                self.gradients.append(_gradient_of(name))

        return look


def earliest(found: Sequence[str | None]) -> str | None:
    """Of what `first_not_finite` said in each process of a run, what came first.

    Processes may share gradients, so that one of them may have brought a NaN to all the others.
    """
    forward = [where for where in found if where and not where.startswith(GRADIENT)]
    where = next(iter([*forward, *filter(None, found)]), None)
    if where is None or found.count(where) == len(found):
        return where
    return f"{where}, in process {found.index(where)} of {len(found)}"


def _gradient_of(name: str) -> str:
    return f"{GRADIENT} {name} (backward pass, outputs finite)"


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _finite(x: Tensor) -> bool:
    # What cards share is looked at as a whole, so that all of them find the same.
    whole = x.full_tensor() if hasattr(x, "full_tensor") else x
    return not x.is_floating_point() or bool(torch.isfinite(whole.detach()).all())
