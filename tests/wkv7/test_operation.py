"""An operation is a node of autograd to a plain call, and a registered operation to who looks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from wkv7.cases import Case, make_inputs

from rwkv7 import wkv7


class Seen(TorchDispatchMode):
    """The names of the operations inside, which run as they do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y, state = wkv7(*inputs, backend="torch")
    return torch.autograd.grad((y**2).sum() + state.sum(), inputs)


def test_a_mode_sees_the_operations_and_the_numbers_are_the_same():
    inputs = [x.requires_grad_() for x in make_inputs(Case(T=5), torch.float32)]
    assert wkv7(*inputs, backend="torch")[0].grad_fn.name() == "rwkv7::wkv7Backward"
    plain = gradients(*inputs)
    with Seen() as seen:
        found = gradients(*inputs)
    assert {"rwkv7::wkv7", "rwkv7::wkv7_backward"} <= set(seen.names)
    assert all(map(torch.equal, plain, found))


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["sum", "square"])
def test_no_second_derivative(loss):
    inputs = [x.requires_grad_() for x in make_inputs(Case(T=5), torch.float32)]
    y, _ = wkv7(*inputs, backend="torch")
    plain = torch.autograd.grad(loss(y), inputs[0], retain_graph=True)[0]
    (gradient,) = torch.autograd.grad(loss(y), inputs[0], create_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(RuntimeError, match="first order"):
        (y.sum() + gradient.square().sum()).backward()
