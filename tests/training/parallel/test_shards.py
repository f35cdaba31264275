"""Checkpoints of many cards: whole or not there, and taken up by any number of them."""

import json
from pathlib import Path

import pytest
import torch
from random_model import error, random_model, random_tokens
from torch.distributed.tensor import DTensor
from training.parallel.test_cards import CONFIG, rows, settings

from rwkv7 import load_model, save_model
from rwkv7.training.loss import predicted
from rwkv7.training.optim import make_optimizer
from rwkv7.training.parallel import parallelise, share
from rwkv7.training.parallel.shards import join_shards, load_shards, newest_shards, save_shards

STEPS = 4


def train(mode, run, begin, end):
    """Steps `begin` to `end` on the ranks there are, from the checkpoint of `begin`; the weights.

    Saves at the end."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cards = parallelise(random_model(CONFIG, seed=begin), mode)
    optimizer = make_optimizer(cards.model, settings())
    if begin:
        shards = newest_shards(run)
        assert shards.step == begin
        load_shards(shards, cards.model, optimizer)
    for step in range(begin, end):
        batch = rows(seed=step)
        optimizer.zero_grad()
        cards.backward([share(batch, rank, size)], int(predicted(batch.targets)))
        cards.clip_(0.5)
        optimizer.step()
    save_shards(run, cards.model, optimizer, settings(), end)
    return [whole(x.detach()) for x in cards.model.parameters()]


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


@pytest.mark.parametrize(
    ("first", "second"), [((2, "fsdp"), (3, "fsdp")), ((2, "fsdp"), (1, "ddp"))]
)
def test_a_run_goes_on_with_another_number_of_cards(ranks, tmp_path, first, second):
    ranks.run(first[0], train, first[1], tmp_path, 0, 2)
    (found, *_) = ranks.run(second[0], train, second[1], tmp_path, 2, STEPS)
    (expected,) = ranks.run(1, train, "ddp", tmp_path / "whole", 0, STEPS)
    for x, y in zip(found, expected, strict=True):
        assert error(x, y) < 1e-10
    joined, optimizer = join_shards(newest_shards(tmp_path))
    for x, y in zip(joined.parameters(), found, strict=True):
        assert torch.equal(x, y.float())
    assert {float(state["step"]) for state in optimizer.state.values()} == {STEPS}
    save_model(joined, tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    tokens = random_tokens(CONFIG, 1, 5)
    assert torch.equal(again(tokens)[0], joined(tokens)[0])


def save_twice(run, damage):
    """Saves step 1, then fails at step 2 as `damage` says; the messages."""
    cards = parallelise(random_model(CONFIG, torch.float32), "fsdp")
    optimizer = make_optimizer(cards.model, settings())
    save_shards(run, cards.model, optimizer, settings(), 0)
    rank = torch.distributed.get_rank()
    writer = torch.distributed.checkpoint.HuggingFaceStorageWriter
    with pytest.MonkeyPatch.context() as patch:
        if damage == "full disk" and rank == 1:
            patch.setattr(writer, "write_data", _no_space)
        if damage == "rename" and rank == 0:
            patch.setattr(Path, "rename", _no_space)
        with pytest.raises(OSError) as raised:
            save_shards(run, cards.model, optimizer, settings(), 1)
    return str(raised.value)


def _no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("damage", ["full disk", "rename"])
def test_a_save_that_fails_leaves_the_one_before(ranks, tmp_path, damage):
    for message in ranks.run(2, save_twice, tmp_path, damage):
        assert "No space left on device" in message and "earlier ones are whole" in message
    assert newest_shards(tmp_path).step == 0
    assert join_shards(newest_shards(tmp_path))


def test_only_whole_checkpoints_count_and_two_are_kept(ranks, tmp_path):
    (tmp_path / "checkpoints" / ".sharded-00000009.partial").mkdir(parents=True)  # by a kill
    for end in range(3):
        ranks.run(1, train, "ddp", tmp_path, 0, end)
    found = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert found == ["sharded-00000001", "sharded-00000002"]
    newest = newest_shards(tmp_path)
    assert (newest.step, newest.settings, newest.config) == (2, settings(), CONFIG)
    (part,) = newest.path.glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    assert newest_shards(tmp_path).step == 1
    damaged = newest_shards(tmp_path)
    (part,) = damaged.path.glob("*.safetensors")
    part.write_bytes(b"\x00" * part.stat().st_size)
    with pytest.raises(ValueError, match="cannot be loaded"):
        join_shards(damaged)
    (damaged.path / "training.json").write_text(json.dumps({"format": 1}))
    assert newest_shards(tmp_path) is None
