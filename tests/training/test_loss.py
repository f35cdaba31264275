"""The loss is the cross entropy alone; its gradient is that of the formula, L2Wrap included.

The oracle is the formula written out in fp64 over all logits at once.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from random_model import error
from torch import Tensor, nn
from torch.nn import functional

from rwkv7.benchmark.clock import peak_mib
from rwkv7.training import loss as loss_module
from rwkv7.training.batch import IGNORED
from rwkv7.training.loss import L2_WRAP, next_token_loss, predicted

B, T, C, V = 3, 5, 8, 11
CPU = torch.device("cpu")


class Case(NamedTuple):
    head: nn.Linear
    features: Tensor
    targets: Tensor


def make(dtype: torch.dtype = torch.float64, size: float = 300.0) -> Case:
    """Features far from zero, so that the pull on the largest logit shows; two targets ignored."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(C, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, C, generator=generator) * C**-0.5)
    features = torch.randn(B, T, C, generator=generator, dtype=torch.float64) * size
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, 1] = targets[2, 4] = IGNORED
    return Case(head.to(dtype), features.to(dtype).requires_grad_(), targets)


@pytest.fixture(params=[1, 4, 100], ids=lambda rows: f"{rows} rows at a time")
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", request.param * V * 8)
    return make()


def formula(case: Case, denominator: float, pull: float = L2_WRAP) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of the features [B, T, C], gradient of the weight [V, C]) in fp64."""
    features, weight = case.features.detach().double(), case.head.weight.detach().double()
    loss, dfeatures, dweight = 0.0, torch.zeros_like(features), torch.zeros_like(weight)
    for place in (case.targets != IGNORED).nonzero().tolist():
        x, target = features[tuple(place)], int(case.targets[tuple(place)])
        logits = weight @ x
        share = torch.exp(logits - logits.logsumexp(0))
        loss = loss + logits.logsumexp(0) - logits[target]
        share[target] -= 1
        first = logits.tolist().index(max(logits.tolist()))
        share[first] += pull * logits[first]
        dfeatures[tuple(place)] = share @ weight
        dweight += torch.outer(share, x)
    return loss / denominator, dfeatures / denominator, dweight / denominator


def test_loss_and_gradients_are_the_formula(case: Case) -> None:
    loss = next_token_loss(*case)
    (3.0 * loss).backward()  # every part of the gradient is scaled with what arrives
    wanted, dfeatures, dweight = formula(case, B * T - 2)
    assert error(loss, wanted) < 1e-12
    assert error(case.features.grad, 3 * dfeatures) < 1e-12
    assert error(case.head.weight.grad, 3 * dweight) < 1e-12
    # L2Wrap is a visible part of it, and not part of the loss.
    without = formula(case, B * T - 2, pull=0.0)
    assert without[0] == wanted and error(dfeatures, without[1]) > 1e-3


def test_gradients_are_those_of_the_cross_entropy_numerically() -> None:
    case = make(size=1.0)
    weight = case.head.weight

    def loss(features: Tensor, weight: Tensor) -> Tensor:
        head = nn.Linear(C, V, bias=False, dtype=torch.float64)
        del head.weight
        head.weight = weight
        return 1.7 * next_token_loss(head, features, case.targets, l2_wrap=0.0)

    assert torch.autograd.gradcheck(loss, (case.features, weight.detach().requires_grad_()))


def test_of_equal_logits_the_first_is_pulled() -> None:
    head = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    nn.init.eye_(head.weight)
    features = torch.tensor([[[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]]], dtype=torch.float64)
    targets, gradients = torch.zeros(1, 2, dtype=torch.int64), []
    for pull in (0.5, 0.0):
        leaf = features.clone().requires_grad_()
        next_token_loss(head, leaf, targets, l2_wrap=pull, denominator=1).backward()
        gradients.append(leaf.grad)
    pulled = gradients[0] - gradients[1]
    assert torch.allclose(pulled, torch.tensor([[[0, 2.5, 0], [1.0, 0, 0]]]).double())


def test_parts_add_up_to_the_whole() -> None:
    case = make()
    count = predicted(case.targets)
    assert int(count) == B * T - 2
    whole = torch.autograd.grad(next_token_loss(*case), (case.features, case.head.weight))
    total = 0.0
    for rows in ((0, 1), (1, 3)):  # of unequal sizes, and the first with a target ignored
        part = case.features[slice(*rows)], case.targets[slice(*rows)]
        loss = next_token_loss(case.head, *part, denominator=count)
        loss.backward()
        total += loss.item()
    assert error(case.features.grad, whole[0]) < 1e-12
    assert error(case.head.weight.grad, whole[1]) < 1e-12
    assert total == pytest.approx(next_token_loss(*case).item(), rel=1e-12)


def test_nothing_to_predict_is_zero_not_nan() -> None:
    case = make()
    loss = next_token_loss(case.head, case.features, torch.full((B, T), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert not case.features.grad.any() and not case.head.weight.grad.any()
    assert next_token_loss(case.head, case.features[:, :0], case.targets[:, :0]).item() == 0


def test_a_frozen_head_and_a_tied_one() -> None:
    case = make()
    _, dfeatures, _ = formula(case, B * T - 2)
    case.head.weight.requires_grad_(False)
    next_token_loss(*case).backward()
    assert case.head.weight.grad is None and error(case.features.grad, dfeatures) < 1e-12

    ids = torch.randint(0, V, (B, T))
    gradients = []
    for plain in (False, True):
        weight = nn.Parameter(case.head.weight.detach().clone())
        tied = nn.Linear(C, V, bias=False, dtype=torch.float64)
        tied.weight = weight
        features = functional.embedding(ids, weight)
        if plain:
            logits = (features @ weight.T).flatten(0, 1)
            loss = functional.cross_entropy(logits, case.targets.flatten())
        else:
            loss = next_token_loss(tied, features, case.targets, l2_wrap=0.0)
        loss.backward()
        gradients.append(weight.grad)
    assert error(gradients[0], gradients[1]) < 1e-12


def test_mixed_precision_multiplies_in_16_bits_and_adds_in_32() -> None:
    case = make(torch.float32, size=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(*case)
    loss.backward()
    wanted, dfeatures, dweight = formula(case, B * T - 2)
    assert loss.dtype == case.features.grad.dtype == case.head.weight.grad.dtype == torch.float32
    assert 1e-6 < error(case.features.grad, dfeatures) < 1e-2
    assert error(case.head.weight.grad, dweight) < 1e-2
    assert error(loss, wanted) < 1e-2
    exact = make(size=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(*exact)
    loss.backward()
    assert error(loss, wanted) < 1e-6 and loss.dtype == torch.float64
    assert error(exact.features.grad, dfeatures) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_on_a_gpu_as_the_formula(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", rows * V * 2)
    case = make(torch.float32, size=1.0)
    wanted, dfeatures, dweight = formula(case, B * T - 2)
    head, features = case.head.cuda(), case.features.detach().cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        loss = next_token_loss(head, features, case.targets.cuda())
    loss.backward()
    assert error(loss.cpu(), wanted) < 1e-2
    assert error(features.grad.cpu(), dfeatures) < 1e-2
    assert error(head.weight.grad.cpu(), dweight) < 1e-2


def test_memory_does_not_grow_with_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 1 << 16)
    width, most = 4, {}
    for vocabulary, rows in ((1 << 10, 256), (1 << 12, 256), (1 << 12, 1024)):
        head = nn.Linear(width, vocabulary, bias=False)
        features = torch.randn(1, rows, width, requires_grad=True)
        targets = torch.zeros(1, rows, dtype=torch.int64)
        found = peak_mib(lambda h=head, x=features, t=targets: next_token_loss(h, x, t), CPU)
        assert found is not None
        # What has to be there: the gradients of weight (and a product on its way) and features.
        gradients = (2 * vocabulary * width + rows * width) * 4
        most[vocabulary, rows] = found * 2**20 - gradients
    pieces = [size / (1 << 16) for size in most.values()]
    assert max(pieces) < 3, most  # in numbers of fp32 pieces; all logits would be 16 to 256 pieces


def test_without_gradients_only_the_loss_is_made() -> None:
    case = make()
    with torch.no_grad():
        loss = next_token_loss(*case)
    assert not loss.requires_grad and error(loss, formula(case, B * T - 2)[0]) < 1e-12


def test_what_does_not_fit_is_named() -> None:
    head, features, targets = make()
    with pytest.raises(TypeError, match="head: expected a torch.nn.Linear without bias"):
        next_token_loss(nn.Linear(C, V), features, targets)
    with pytest.raises(ValueError, match=r"features: expected \[B, T, C\] = \[3, 4, 8\]"):
        next_token_loss(head, features, targets[:, 1:])
    with pytest.raises(ValueError, match="targets: expected ids from 0 to 10, .* found 11"):
        next_token_loss(head, features, torch.full((B, T), V))


def test_a_graph_that_is_kept_gives_the_same_twice_and_one_that_is_not_says_so() -> None:
    head, features, targets = make()
    loss = next_token_loss(head, features, targets)
    inputs = (features, head.weight)
    one = torch.autograd.grad(loss, inputs, retain_graph=True)
    other = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, one, other))
    with pytest.raises(RuntimeError, match="expected retain_graph=True in the first"):
        loss.backward()
