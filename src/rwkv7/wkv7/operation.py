"""How a kernel's work is called: at once, as a node of autograd, or as a registered operation.

A registered operation is what tracers see: torch.compile, tensors of another type, dispatch modes.
Going through one takes the host longer than many kernels take the GPU, so that nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Any, ...]]


class _FirstOrder(torch.autograd.Function):
    """Gradients, as they are, that know what they were found from; their own gradient raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.name = name
        return tuple([x if x is None else x.view_as(x) for x in tensors[:count]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            f"{ctx.name}: derivatives are first order; a gradient found with create_graph=True has "
            "none of its own"
        )


class Operation:
    """`run`, a function of tensors and numbers, under a name.

    Args:
        name: "rwkv7::…".
        run: annotated as torch.library.custom_op wants it; its outputs share no memory with its
            inputs or with each other.
        fake: the same without values, for tracers.
        changes: the names of the arguments that `run` changes in place.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        changes: Sequence[str] = (),
    ) -> None:
        self._name, self._run = name, run
        self._operator = torch.library.custom_op(name, run, mutates_args=changes)
        self._operator.register_fake(fake)
        self._node: Callable[..., Any] | None = None

    def differentiable(self, setup: Setup, backward: Backward) -> None:
        """With a gradient, in the form of torch.library.register_autograd; no list of tensors is
        among the inputs."""
        self._operator.register_autograd(backward, setup_context=setup)
        run, name = self._run, self._name

        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = run(*inputs)
            setup(ctx, inputs, outputs)
            ctx.is_list = isinstance(outputs, list)
            return tuple(outputs) if ctx.is_list else outputs

        def back(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            given = (list(grads),) if ctx.is_list else grads
            if not torch.is_grad_enabled():
                return backward(ctx, *given)
            with torch.no_grad():
                found = backward(ctx, *given)
            # With create_graph: what gradients depend on must not be forgotten without a word.
            sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
            return _FirstOrder.apply(name, len(found), *found, *sources)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(back)}
        node: Any = type(self._name, (torch.autograd.Function,), methods)
        self._node = node.apply

    def __call__(self, *inputs: Any) -> Any:
        """What `run` gives; the first of the inputs is a tensor, or a list of them."""
        if is_traced(inputs[0]):
            return self._operator(*inputs)
        if self._node is None or not torch.is_grad_enabled():
            return self._run(*inputs)
        return self._node(*inputs)


def is_traced(x: Tensor | list[Tensor]) -> bool:
    """Whether a call on x is to be a registered operation: somebody looks at those."""
    if torch.compiler.is_compiling():
        return True
    first = x[0] if isinstance(x, list) else x
    shape_alone = type(first) is not Tensor or first.is_meta
    return shape_alone or torch._C._len_torch_dispatch_stack() > 0
