"""A sequence in windows has the gradients of one backward pass over all of it, to the last digit.

The oracle is that pass, by autograd, with the loss and L2Wrap written out.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from random_model import error, random_model, random_state, random_tokens, rows
from torch import Tensor
from torch.nn import functional

from rwkv7 import RWKV7, ModelConfig, ModelState
from rwkv7.benchmark.clock import peak_mib
from rwkv7.state import LayerState
from rwkv7.training.batch import IGNORED, Batch
from rwkv7.training.carry import batch_gradients, sequence_gradients
from rwkv7.training.loss import L2_WRAP

CONFIG = ModelConfig(
    vocab_size=13,
    width=16,
    layers=2,
    head_size=8,
    decay_rank=4,
    iclr_rank=4,
    value_rank=3,
    gate_rank=5,
)
B, T, WINDOW = 2, 41, 8  # six windows, the last of one token


def sequence(batch: int = B, tokens: int = T) -> tuple[Tensor, Tensor]:
    ids = random_tokens(CONFIG, batch, tokens + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 3:7] = IGNORED  # so that windows differ in how much they predict
    targets[-1, -3] = IGNORED
    return inputs, targets


def in_one_piece(
    model: RWKV7,
    inputs: Tensor,
    targets: Tensor,
    state: ModelState | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ModelState]:
    """(the mean loss, the state), with the whole graph; backward has been run."""
    logits, after = model(inputs, state, cu_seqlens)
    logits, targets = logits.flatten(0, 1), targets.flatten()
    loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED)
    counted = targets != IGNORED
    pull = (logits.amax(-1)[counted] ** 2).sum() * L2_WRAP / 2 / counted.sum()
    (loss + pull).backward()
    return loss.detach(), after.detach()


def taken(model: RWKV7) -> dict[str, Tensor]:
    """The gradients by name; the model has none any more."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(error(found[name], expected[name]) for name in expected)


def trainable_state(model: RWKV7, batch: int) -> ModelState:
    state = random_state(model.config, batch, model.dtype)
    for x in rows(state):
        x.requires_grad_()
    return state


@pytest.mark.parametrize(
    ("window", "offload"), [(1, False), (7, True), (WINDOW, False), (T - 1, False), (1000, True)]
)
def test_exact_is_the_gradient_in_one_piece(window: int, offload: bool) -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence()
    loss, after = in_one_piece(model, inputs, targets)
    expected = taken(model)
    result = sequence_gradients(model, inputs, targets, window=window, offload=offload)
    assert error(result.loss, loss) < 1e-12
    assert not result.loss.requires_grad
    assert farthest(taken(model), expected) < 1e-10
    for x, y in zip(rows(result.state), rows(after), strict=True):
        assert error(x, y) < 1e-10 and not x.requires_grad


def test_the_other_modes_are_what_they_say_and_not_exact() -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence()
    loss, after = in_one_piece(model, inputs, targets)
    whole, count = taken(model), int((targets != IGNORED).sum())

    def by_hand(carried: bool) -> tuple[float, dict[str, Tensor]]:
        total, state = 0.0, None
        for start in range(0, T, WINDOW):
            some = slice(start, start + WINDOW)
            logits, end = model(inputs[:, some], state)
            part = functional.cross_entropy(
                logits.flatten(0, 1), targets[:, some].flatten(), reduction="sum"
            )
            highest = logits.amax(-1)[targets[:, some] != IGNORED]
            ((part + (highest**2).sum() * L2_WRAP / 2) / count).backward()
            total, state = total + part.item() / count, end.detach() if carried else None
        return total, taken(model)

    for mode, carried in (("truncated", True), ("off", False)):
        total, gradients = by_hand(carried)
        result = sequence_gradients(model, inputs, targets, window=WINDOW, mode=mode)
        found = taken(model)
        assert result.loss.item() == pytest.approx(total, rel=1e-12)
        assert farthest(found, gradients) < 1e-10
        apart = {name: error(found[name], whole[name]) for name in whole}
        # Features, and with them the head's gradient, are those of the whole where a state goes on.
        assert (apart["head.weight"] < 1e-10) is carried
        assert apart["blocks.0.att.key.weight"] > 1e-2 and apart["emb.weight"] > 1e-3
        assert (error(result.state.layers[1].wkv, after.layers[1].wkv) < 1e-10) is carried
        assert (abs(result.loss.item() / loss.item() - 1) < 1e-10) is carried


@pytest.mark.parametrize("mode", ["exact", "truncated", "off"])
def test_a_given_state_gets_its_gradient(mode: str) -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence()
    state = trainable_state(model, B)
    one_piece = trainable_state(model, B)
    in_one_piece(model, inputs, targets, one_piece)
    expected = taken(model)
    sequence_gradients(model, inputs, targets, window=WINDOW, mode=mode, state=state)
    found = taken(model)
    apart = [error(x.grad, y.grad) for x, y in zip(rows(state), rows(one_piece), strict=True)]
    assert max(apart) < 1e-10 if mode == "exact" else apart[0] > 1e-3  # layer 0's WKV state
    assert (farthest(found, expected) < 1e-10) is (mode == "exact")


def test_only_a_state_is_tuned_through_a_frozen_model_and_what_made_it() -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    gradients = []
    tuned = torch.randn(2, 2, 8, 8, generator=generator, dtype=torch.float64)
    for whole in (True, False):
        leaf = tuned.clone().requires_grad_()
        zeros = ModelState.zeros(CONFIG, B, torch.float64).layers
        state = ModelState(
            tuple(
                LayerState(wkv.expand(B, -1, -1, -1), layer.time_shift, layer.channel_shift)
                for wkv, layer in zip(leaf, zeros, strict=True)
            )
        )
        if whole:
            in_one_piece(model, inputs, targets, state)
        else:
            sequence_gradients(model, inputs, targets, window=WINDOW, state=state)
        gradients.append(leaf.grad)
    assert error(gradients[1], gradients[0]) < 1e-10
    assert all(parameter.grad is None for parameter in model.parameters())


# Cut amid a document, at its end, with empty documents at the border and at both ends, and one
# document longer than two windows.
PACKED = [0, 0, 3, 8, 8, 8, 9, 30, 32, 32, 36, 41, 41]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("window", [2, 5, WINDOW, T])
def test_packed_documents(window: int, given: bool) -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence(1)
    offsets = torch.tensor(PACKED, dtype=torch.int32)
    state, one_piece = (
        trainable_state(model, len(PACKED) - 1) if given else None for _ in range(2)
    )
    loss, after = in_one_piece(model, inputs, targets, one_piece, offsets)
    expected = taken(model)
    result = sequence_gradients(
        model, inputs, targets, window=window, state=state, cu_seqlens=offsets
    )
    assert error(result.loss, loss) < 1e-12
    assert farthest(taken(model), expected) < 1e-10
    for x, y in zip(rows(result.state), rows(after), strict=True):
        assert error(x, y) < 1e-10
    if state is not None and one_piece is not None:
        for x, y in zip(rows(state), rows(one_piece), strict=True):
            assert error(x.grad, y.grad) < 1e-10


@pytest.mark.parametrize("mode", ["truncated", "off"])
def test_packed_documents_cut_in_the_other_modes(mode: str) -> None:
    """Where no document is cut, nothing is lost; where one is, each mode loses what it says."""
    model, (inputs, targets) = random_model(CONFIG), sequence(1, 24)
    for offsets, cut in (([0, 4, 8, 16, 24], False), ([0, 4, 12, 16, 24], True)):
        cu_seqlens = torch.tensor(offsets)
        loss, after = in_one_piece(model, inputs, targets, cu_seqlens=cu_seqlens)
        expected = taken(model)
        result = sequence_gradients(
            model, inputs, targets, window=8, mode=mode, cu_seqlens=cu_seqlens
        )
        assert (farthest(taken(model), expected) < 1e-10) is not cut
        carried = not cut or mode == "truncated"
        assert (error(result.state.layers[1].wkv, after.layers[1].wkv) < 1e-10) is carried
        assert (abs(result.loss.item() - loss.item()) < 1e-10) is carried


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_memory_is_that_of_a_window(mode: str) -> None:
    model = random_model(CONFIG, torch.float32)
    window, state = 32, ModelState.zeros(CONFIG, 1)
    edge = sum(x.numel() * x.element_size() for x in rows(state))

    def peak(run: Callable[[], object]) -> float:
        found = peak_mib(run, torch.device("cpu"))
        assert found is not None
        return found * 2**20

    most = {}
    for windows in (1, 4, 32):
        inputs, targets = sequence(1, windows * window)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        most[windows] = peak(
            lambda x=inputs, y=targets: sequence_gradients(model, x, y, window=window, mode=mode)
        )
    kept = 28 * edge if mode == "exact" else 0
    assert most[32] - most[4] <= kept + 0.02 * most[4], most
    assert most[4] < 1.25 * most[1] + 4 * edge, most
    # In one piece 32 windows take many times as much: what is flat is not flat by itself.
    assert peak(lambda: in_one_piece(model, inputs, targets)) > 8 * most[32]


def test_mixed_precision_keeps_weights_and_gradients_in_fp32() -> None:
    model, (inputs, targets) = random_model(CONFIG, torch.float32), sequence()
    exact = random_model(CONFIG)
    in_one_piece(exact, inputs, targets)
    expected = taken(exact)
    with torch.autocast("cpu", torch.bfloat16):
        result = sequence_gradients(model, inputs, targets, window=WINDOW)
        assert torch.is_autocast_enabled("cpu")
    found = taken(model)
    assert result.loss.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in (*found.values(), *rows(result.state)))
    whole = torch.cat([x.flatten() for x in expected.values()])
    assert 1e-4 < error(torch.cat([x.flatten() for x in found.values()]), whole) < 3e-2


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", ["off", "exact"])
def test_parts_of_a_batch_add_up_to_its_gradient(parts: int, mode: str) -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence(5, 12)
    targets[1] = IGNORED  # the parts predict unequal numbers of tokens
    window = 12 if mode == "off" else 5
    loss, _ = in_one_piece(model, inputs, targets)
    expected = taken(model)
    batch = Batch(inputs=inputs, targets=targets)
    states = [trainable_state(model, 5) for _ in range(2)]
    found = batch_gradients(model, batch, window=window, mode=mode, parts=parts)
    assert error(found, loss) < 1e-12
    assert farthest(taken(model), expected) < 1e-10
    in_one_piece(model, inputs, targets, states[0])
    batch_gradients(model, batch, window=window, mode=mode, parts=parts, state=states[1])
    for x, y in zip(rows(states[1]), rows(states[0]), strict=True):
        assert error(x.grad, y.grad) < 1e-10


@pytest.mark.parametrize(("mode", "parts"), [("off", 1), ("off", 3), ("exact", 1), ("exact", 2)])
def test_a_batch_of_packed_documents(mode: str, parts: int) -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence(1)
    offsets = torch.tensor(PACKED, dtype=torch.int32)
    loss, _ = in_one_piece(model, inputs, targets, None, offsets)
    expected = taken(model)
    batch = Batch(inputs=inputs, targets=targets, cu_seqlens=offsets).to("cpu")
    found = batch_gradients(model, batch, window=19, mode=mode, parts=parts)
    assert error(found, loss) < 1e-12
    assert farthest(taken(model), expected) < 1e-10


def test_no_tokens_give_the_state_back() -> None:
    model = random_model(CONFIG)
    nothing, state = torch.zeros(B, 0, dtype=torch.int64), random_state(CONFIG, B)
    result = sequence_gradients(model, nothing, nothing, window=WINDOW, state=state)
    assert result.loss.item() == 0
    assert all(map(torch.equal, rows(result.state), rows(state)))


def test_what_makes_no_sense_is_refused() -> None:
    model, (inputs, targets) = random_model(CONFIG), sequence()
    for change, message in (
        ({"mode": "all"}, "mode: expected one of off, truncated, exact, found 'all'"),
        ({"window": 0}, "window: expected at least 1 token, found 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: expected offsets from 0 to T = 41"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_gradients(model, inputs, targets, **{"window": WINDOW, **change})
    with pytest.raises(ValueError, match=r"targets: expected the shape of inputs"):
        sequence_gradients(model, inputs, targets[:, 1:], window=WINDOW)
    batch, goes_on = (Batch(inputs=inputs, targets=targets, fresh=fresh) for fresh in (True, False))
    row = Batch(inputs=inputs[:1], targets=targets[:1], cu_seqlens=torch.tensor([0, T]))
    for wrong, options, message in (
        (batch, {"parts": 3}, "parts: expected 1 to the 2 rows of the batch, found 3"),
        (row, {"parts": 42}, "parts: expected 1 to the 41 tokens of the packed row, found 42"),
        (row, {"parts": 2, "mode": "truncated", "window": 9}, "parts: expected 1 for packed"),
        (batch, {"mode": "exact"}, "window: expected a number of tokens for the mode 'exact'"),
        (goes_on, {}, "state: expected the one that the batch before ended with"),
    ):
        with pytest.raises(ValueError, match=message):
            batch_gradients(model, wrong, **options)
    assert all(parameter.grad is None for parameter in model.parameters())
