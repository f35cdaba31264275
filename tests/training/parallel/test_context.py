"""One sequence on several ranks: results, states and gradients are those of one process."""

import dataclasses
from functools import partial

import pytest
import torch
from random_model import SMALL, error, random_model, random_state, random_tokens, rows
from torch.utils.checkpoint import checkpoint

from rwkv7.training.parallel import ContextParallel, cut, sum_gradients, wkv7_in_pieces
from rwkv7.wkv7 import wkv7

CONFIG = dataclasses.replace(SMALL, layers=2)
BOUND = 1e-10


def test_a_piece_knows_what_goes_on_over_its_ends():
    first, second, third = (cut([4, 3, 5], rank, [0, 2, 2, 9, 12]) for rank in range(3))
    assert first.numbers == (0, 2) and first.offsets == (0, 2, 4)
    assert (first.head, first.tail, first.owned) == (0, 2, (True, False))
    assert second.numbers == (2,) and second.spans and second.owned == (False,)
    assert third.numbers == (2, 3) and third.offsets == (0, 2, 5)
    assert (third.head, third.tail, third.owned) == (2, 0, (True, True))


def problem(batch, tokens, sequences=None):
    """Tokens, a state, and weights that make one number of the logits and of the final state."""
    given = random_state(CONFIG, sequences or batch)
    generator = torch.Generator().manual_seed(5)

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    logits = like(torch.empty(batch, tokens, CONFIG.vocab_size))
    return random_tokens(CONFIG, batch, tokens), given, logits, [like(x) for x in rows(given)]


def results(model, inputs, state, offsets, weights, parts, shared=1):
    """(logits, final state, gradients of parameters, of the state given); the loss is weighted."""
    leaves = [x.requires_grad_() for x in rows(state)] if state else []
    logits, final = model(inputs, state, offsets)
    loss = (logits * weights).sum()
    loss = loss + sum((x * y).sum() for x, y in zip(rows(final), parts, strict=True)) / shared
    loss.backward()
    return logits, rows(final), leaves


def on_ranks(lengths, batch, offsets, with_state, checkpointed=False):
    total, rank = sum(lengths), torch.distributed.get_rank()
    tokens, given, weights, parts = problem(batch, total, offsets and len(offsets) - 1)
    begin = sum(lengths[:rank])
    mine = slice(begin, begin + lengths[rank])
    model = random_model(CONFIG)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    logits, final, leaves = results(
        ContextParallel(model),
        tokens[:, mine],
        given if with_state else None,
        cu_seqlens,
        weights[:, mine],
        parts,
        shared=len(lengths),
    )
    sum_gradients([*model.parameters(), *leaves])
    grads = [x.grad for x in (*model.parameters(), *leaves)]
    return [x.detach() for x in (logits, *final, *grads)]


@pytest.mark.parametrize(
    ("lengths", "batch", "offsets", "with_state"),
    [
        ([5, 8], 2, None, True),
        ([5, 8], 2, None, False),
        ([1, 7, 3], 2, None, True),
        ([6, 5], 1, [0, 3, 3, 9, 11], True),
        ([4, 3, 5], 1, [0, 2, 2, 9, 12], True),
        ([4, 3, 5], 1, [0, 0, 12, 12], True),
        ([4, 3, 5], 1, [0, 4, 6, 7, 12], False),
    ],
)
def test_a_model_in_pieces_is_the_model(ranks, lengths, batch, offsets, with_state):
    found = ranks.run(len(lengths), on_ranks, lengths, batch, offsets, with_state)
    tokens, given, weights, parts = problem(batch, sum(lengths), offsets and len(offsets) - 1)
    model = random_model(CONFIG)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    state = given if with_state else None
    logits, final, leaves = results(model, tokens, state, cu_seqlens, weights, parts)
    grads = [x.grad for x in (*model.parameters(), *leaves)]
    assert error(torch.cat([mine[0] for mine in found], 1), logits) < BOUND
    for mine in found:
        for x, y in zip(mine[1:], [*final, *grads], strict=True):
            assert error(x, y) < BOUND or x.norm() == y.norm() == 0


def operator_inputs(tokens, keys, values):
    """r, w, k, v, a, b for one batch of two, 3 heads, unit keys; a state; dy; dstate."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    r, w, k, key = (normal(2, tokens, 3, keys) for _ in range(4))
    key = torch.nn.functional.normalize(key, dim=-1)
    inputs = [r, w, k, normal(2, tokens, 3, values), -key, key * 0.7]
    y, state = normal(2, tokens, 3, values), normal(2, 3, values, keys)
    return inputs, state, y, normal(*state.shape)


def operator_on_ranks(lengths, keys, values):
    rank = torch.distributed.get_rank()
    inputs, state, dy, dstate = operator_inputs(sum(lengths), keys, values)
    pieces = [x.split(lengths, 1)[rank].clone().requires_grad_() for x in inputs]
    state.requires_grad_()
    y, final = wkv7_in_pieces(tuple(pieces), state, cut(lengths, rank))
    # The state in the end counts on the last rank, where it is; elsewhere it is one on the way.
    last = float(rank == len(lengths) - 1)
    found = (y, final)
    grads = torch.autograd.grad(
        found, [*pieces, state], (dy.split(lengths, 1)[rank], dstate * last)
    )
    return [x.detach() for x in (*found, *grads)]


@pytest.mark.parametrize(("keys", "values"), [(8, 8), (6, 10)])
def test_the_operator_in_pieces_is_the_operator(ranks, keys, values):
    found = ranks.run(3, operator_on_ranks, [20, 5, 29], keys, values)
    inputs, state, dy, dstate = operator_inputs(54, keys, values)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    y, final = wkv7(*inputs, state)
    grads = torch.autograd.grad((y, final), leaves, (dy, dstate))
    by_rank = list(zip(*found, strict=True))
    for parts, whole in zip((by_rank[0], *by_rank[2:8]), (y, *grads[:6]), strict=True):
        assert error(torch.cat(parts, 1), whole) < BOUND
    assert error(found[-1][1], final) < BOUND
    assert error(sum(by_rank[8]), grads[6]) < BOUND


def kinds_on_ranks(kind):
    """Gradients where activations are made again in backward, or under autocast, or none."""
    tokens, _, weights, _ = problem(2, 12)
    mine = slice(*((0, 7) if torch.distributed.get_rank() == 0 else (7, 12)))
    model = random_model(CONFIG, torch.float32 if kind == "autocast" else torch.float64)
    model.recompute = "layers" if kind == "checkpointed layers" else "nothing"
    context = ContextParallel(model)
    if kind == "no gradient":
        with torch.no_grad():
            return [context(tokens[:, mine])[0]]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        call = context
        if kind == "checkpoint":
            call = partial(checkpoint, context, use_reentrant=False)
        logits, _ = call(tokens[:, mine])
    (logits.double() * weights[:, mine]).sum().backward()
    sum_gradients(model.parameters())
    return [logits.detach(), *(x.grad for x in model.parameters())]


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("checkpoint", BOUND),
        ("checkpointed layers", BOUND),
        ("no gradient", BOUND),
        ("autocast", 5e-2),
    ],
)
def test_pieces_go_with_what_training_uses(ranks, kind, bound):
    found = ranks.run(2, kinds_on_ranks, kind)
    tokens, _, weights, _ = problem(2, 12)
    model = random_model(CONFIG)
    logits, _ = model(tokens)
    (logits * weights).sum().backward()
    assert error(torch.cat([mine[0] for mine in found], 1), logits) < bound
    for mine in found:
        for x, parameter in zip(mine[1:], model.parameters(), strict=kind != "no gradient"):
            assert error(x, parameter.grad) < bound


def refusals_on_ranks():
    context, rank = ContextParallel(random_model(CONFIG)), torch.distributed.get_rank()
    messages = []
    for lengths, offsets in (([0, 3], None), ([2, 3], [0, 4]), ([2, 3], [0, 5 + rank])):
        cu_seqlens = None if offsets is None else torch.tensor(offsets)
        with pytest.raises(ValueError) as raised:
            context(random_tokens(CONFIG, 1, lengths[rank]), None, cu_seqlens)
        messages.append(str(raised.value))
    return messages


def test_pieces_that_do_not_fit_are_refused_on_every_rank(ranks):
    for messages in ranks.run(2, refusals_on_ranks):
        assert "at least one on every rank, found [0, 3]" in messages[0]
        assert "to T = 5" in messages[1]
        assert "the same ends of offsets on every rank, found [5, 6]" in messages[2]
