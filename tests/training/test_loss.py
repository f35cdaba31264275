"""The loss is the cross entropy alone; its gradient is that of the formula, L2Wrap included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rwkv7.training import loss as loss_module
from rwkv7.training.loss import L2_WRAP, l2_wrap, next_token_loss

B, T, C, V = 3, 5, 8, 11


@pytest.fixture
def case() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(C, V, bias=False)
    # Far from zero, so that the pull on the largest logit shows beside the cross entropy.
    features = torch.randn(B, T, C) * 300
    return head, features.requires_grad_(), torch.randint(0, V, (B, T))


def test_gradient_follows_the_formula(case: tuple[nn.Linear, Tensor, Tensor]) -> None:
    head, features, targets = case
    loss = next_token_loss(head, features, targets)
    (3.0 * loss).backward()  # every part of the gradient is scaled with what arrives

    logits = head(features.detach()).double().flatten(0, 1)
    wanted = functional.cross_entropy(logits, targets.flatten())
    assert torch.allclose(loss.double(), wanted)
    dlogits = logits.softmax(-1) - functional.one_hot(targets.flatten(), V)
    rows = torch.arange(B * T)
    dlogits[rows, logits.argmax(-1)] += L2_WRAP * logits.amax(-1)
    dlogits *= 3.0 / (B * T)
    dfeatures = dlogits @ head.weight.double()
    assert torch.allclose(features.grad.flatten(0, 1).double(), dfeatures, rtol=1e-4, atol=1e-6)
    dweight = dlogits.T @ features.detach().double().flatten(0, 1)
    assert torch.allclose(head.weight.grad.double(), dweight, rtol=1e-4, atol=1e-4)


def test_of_equal_logits_the_first_is_pulled() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]], requires_grad=True)
    loss = l2_wrap(torch.zeros((), requires_grad=True), logits, 0.5)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.tolist() == [[0, 2.5, 0], [1, 0, 0]]


def test_some_rows_at_a_time_give_the_same(
    case: tuple[nn.Linear, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    head, features, targets = case
    whole = next_token_loss(head, features, targets)
    expected = torch.autograd.grad(whole, (features, head.weight))
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 4 * V)
    parts = next_token_loss(head, features, targets)
    found = torch.autograd.grad(parts, (features, head.weight))
    assert torch.allclose(parts, whole)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
