"""Many rows on several ranks: the gradient, the loss and the step are those of one process."""

import dataclasses

import pytest
import torch
from random_model import SMALL, error, random_model, random_tokens
from torch.distributed.tensor import DTensor

from rwkv7.training import TrainSettings
from rwkv7.training.batch import IGNORED, Batch
from rwkv7.training.loss import next_token_loss, predicted
from rwkv7.training.optim import make_optimizer
from rwkv7.training.parallel import parallelise, share

# One head, so that a part of a parameter may be all of it or nothing.
CONFIG = dataclasses.replace(SMALL, layers=2, width=8)
BOUND = 1e-10


def rows(seed=2, count=5):
    """A batch in which the rows' shares of predicted tokens differ much."""
    tokens = random_tokens(CONFIG, count, 8, seed=seed)
    targets = tokens.roll(-1, 1)
    targets[0] = IGNORED
    targets[1, 3:] = IGNORED
    return Batch(inputs=tokens, targets=targets)


def documents():
    tokens = random_tokens(CONFIG, 1, 30)
    offsets = torch.tensor([0, 4, 4, 15, 18, 30], dtype=torch.int32)
    return Batch(inputs=tokens, targets=tokens.roll(-1, 1), cu_seqlens=offsets)


def settings():
    return TrainSettings(lr=1e-2, weight_decay=0.1, steps=2)


def on_ranks(mode, batch, parts, recompute):
    """(loss, norm, gradients, parameters after two steps) of this rank's share, in parts."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = random_model(CONFIG, seed=rank)  # the first rank's is to count
    model.recompute = recompute
    cards = parallelise(model, mode)
    optimizer = make_optimizer(model, settings())
    mine = share(batch, rank, size)
    chunks = [share(mine, part, parts) for part in range(parts)]
    count = int(predicted(batch.targets))
    for _ in range(2):
        optimizer.zero_grad()
        loss = cards.backward(chunks, count)
        grads = [whole(x.grad).clone() for x in model.parameters()]
        norm = cards.clip_(0.5)
        optimizer.step()
    return [loss, norm, *grads, *(whole(x.detach()) for x in model.parameters())]


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def alone(batch):
    model = random_model(CONFIG, seed=0)
    optimizer = make_optimizer(model, settings())
    for _ in range(2):
        optimizer.zero_grad()
        features, _ = model.hidden(batch.inputs, cu_seqlens=batch.cu_seqlens)
        loss = next_token_loss(model.head, features, batch.targets)
        loss.backward()
        grads = [x.grad.clone() for x in model.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [loss, norm, *grads, *model.parameters()]


@pytest.mark.parametrize(
    ("mode", "batch", "parts", "recompute"),
    [
        ("ddp", rows(), 1, "nothing"),
        ("ddp", rows(), 2, "layers"),
        ("fsdp", rows(), 2, "nothing"),
        ("fsdp", rows(), 2, "cheap"),
        ("fsdp", documents(), 1, "nothing"),
        ("ddp", documents(), 3, "nothing"),  # one of the ranks has a document less than parts
        ("fsdp", documents(), 3, "nothing"),
    ],
)
def test_two_ranks_step_as_one_process(ranks, mode, batch, parts, recompute):
    expected = alone(batch)
    for mine in ranks.run(2, on_ranks, mode, batch, parts, recompute):
        for x, y in zip(mine, expected, strict=True):
            assert error(x, y) < BOUND


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_the_batch_and_cut_no_document(size):
    batch = documents()
    shares = [share(batch, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([x.inputs for x in shares], 1), batch.inputs)
    assert torch.equal(torch.cat([x.targets for x in shares], 1), batch.targets)
    lengths = [x.cu_seqlens.diff() for x in shares]
    assert [n for n in torch.cat(lengths).tolist() if n] == [4, 11, 3, 12]
    assert all(int(x.cu_seqlens[-1]) == x.inputs.shape[1] for x in shares)
    by_row = [share(rows(), rank, size).inputs for rank in range(size)]
    assert torch.equal(torch.cat(by_row), rows().inputs)


@pytest.mark.parametrize(("batch", "size"), [(rows(), 7), (documents(), 6)])
def test_a_rank_without_a_share_joins_in_and_adds_nothing(batch, size):
    shares = [share(batch, rank, size) for rank in range(size)]
    assert all(x.inputs.numel() for x in shares)
    assert sum(int(predicted(x.targets)) for x in shares) == int(predicted(batch.targets))
    idle = [x for x in shares if bool((x.targets == IGNORED).all())]
    assert len(idle) == 2 + (batch.cu_seqlens is None)  # the row with nothing in it, too
    for x in idle:
        assert x.cu_seqlens is None or x.cu_seqlens.tolist() == [0, x.inputs.shape[1]]


def test_without_processes_there_are_no_cards():
    with pytest.raises(ValueError, match="torchrun"):
        parallelise(random_model(CONFIG))
