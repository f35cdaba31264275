"""The prefix cache: what prompts share is read once, and every bound is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from talking_model import talking_model

from rwkv7 import ModelState
from rwkv7.engine import Engine, PrefixCache, Request
from rwkv7.engine import prefill as prefill_module
from rwkv7.sampling import Sampler

SYSTEM = list(b"You are a helpful assistant. Say what is the case.")  # 50 tokens
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def model():
    return talking_model()


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(prefill_module, "PIECE", 8)


@pytest.fixture
def read(model, monkeypatch):
    """A list that grows by the number of tokens of every call that reads prompts."""
    counts, advance = [], prefill_module.Prefill._advance

    def counting(self, pieces):
        counts.append(sum(size for _, size in pieces))
        return advance(self, pieces)

    monkeypatch.setattr(prefill_module.Prefill, "_advance", counting)
    return counts


def ask(question):
    return Request([*SYSTEM, *question], max_tokens=6, sampler=Sampler(0), logprobs=1)


def results(engine, questions):
    handles = [engine.submit(ask(question)) for question in questions]
    return [(h.result().tokens, h.result().logprobs) for h in handles]


@pytest.mark.parametrize("deterministic", [True, False])
def test_with_and_without_a_cache_the_answers_are_the_same(model, read, deterministic):
    questions = [bytes([i] * (3 + i)) for i in range(9)]
    plain = Engine(model, slots=4, max_prefill_tokens=64, deterministic=deterministic)
    expected = results(plain, questions)
    without = sum(read)
    read.clear()
    cache = PrefixCache(model, PLENTY)
    engine = Engine(model, slots=4, max_prefill_tokens=64, deterministic=deterministic, cache=cache)
    found = results(engine, questions)
    if deterministic:
        assert found == expected
    else:
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert sum(read) < 0.5 * without
    assert cache.hits >= 7


def test_a_burst_reads_what_it_shares_once(model, read):
    cache = PrefixCache(model, PLENTY)
    engine = Engine(model, slots=8, max_prefill_tokens=4096, cache=cache)
    results(engine, [b"a%d" % i for i in range(8)])
    # One reads 32 tokens and all of its rest; the others read from there on. The second has by
    # then shown where they part, at 48.
    assert sum(read) < 8 * len(SYSTEM) * 0.6


def test_a_conversation_goes_on_from_its_own_beginning(model, read):
    engine = Engine(model, slots=1, cache=PrefixCache(model, PLENTY))
    answer = engine.submit(ask(b"hello, who is there?")).result()
    read.clear()
    engine.submit(ask(bytes([*b"hello, who is there?", *answer.tokens, *b" ok"]))).result()
    assert sum(read) < 20


def test_requests_with_a_state_do_not_touch_it(model):
    cache = PrefixCache(model, PLENTY)
    engine = Engine(model, slots=1, cache=cache)
    engine.submit(ask(b"x")).result()
    with torch.no_grad():
        _, state = model(torch.tensor([[1, 2, 3]]))
    request = Request([*SYSTEM, 1], max_tokens=4, sampler=Sampler(0), state=state)
    plain = Engine(model, slots=1).submit(request).result()
    assert engine.submit(request).result().tokens == plain.tokens
    assert cache.hits == 0


def fill(cache, model, count):
    tokens = torch.arange(8 * count) % 256
    names = cache.names(tokens, 8)
    for i, name in enumerate(names):
        state = ModelState.zeros(model.config)
        state.layers[0].wkv.fill_(i)
        cache.put(name, state)
    return names


def number(found):
    return None if found is None else int(found.layers[0].wkv[0, 0, 0, 0])


def test_memory_and_disk_are_bounded_and_the_oldest_goes_first(model, tmp_path):
    size = Engine(model, slots=1).budget.state
    cache = PrefixCache(model, 2 * size, tmp_path / "new", 7 * size)
    names = fill(cache, model, 6)
    assert cache.memory_used == 2 * size
    assert [name in cache for name in names] == [True] * 6
    assert number(cache.longest(names[:1])[1]) == 0  # from the disk
    fill(cache, model, 12)
    assert cache.memory_used <= 2 * size
    assert cache.disk_used <= 7 * size
    on_disk = sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    assert on_disk == cache.disk_used
    count, state = cache.longest(names)
    assert (count, number(state)) == (6, 5) or count < 6


def test_another_process_finds_what_was_spilled(model, tmp_path):
    names = fill(PrefixCache(model, 0, tmp_path, PLENTY), model, 3)
    later = PrefixCache(model, PLENTY, tmp_path, PLENTY)
    count, state = later.longest(names)
    assert (count, number(state)) == (3, 2)
    stranger = PrefixCache(talking_model(seed=1), PLENTY, tmp_path, PLENTY)
    assert stranger.longest(stranger.names(torch.arange(24), 8)) == (0, None)
    smaller = PrefixCache(model, PLENTY, tmp_path, later.disk_used // 2)
    assert smaller.disk_used <= later.disk_used // 2


def test_damaged_files_and_a_full_disk_cost_time_alone(model, tmp_path, monkeypatch):
    cache = PrefixCache(model, 0, tmp_path, PLENTY)
    names = fill(cache, model, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-99])
    with pytest.warns(RuntimeWarning, match="prefix cache is left out.*truncated"):
        assert cache.longest(names) == (0, None)
    assert not list(tmp_path.iterdir())

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rwkv7.state.save_file", full)
    names = fill(cache, model, 3)
    assert cache.longest(names) == (0, None)
    assert not list(tmp_path.iterdir())


def test_one_wrong_bit_on_the_disk_is_noticed(model, tmp_path):
    cache = PrefixCache(model, 0, tmp_path, PLENTY)
    names = fill(cache, model, 2)
    (longest,) = tmp_path.glob(f"{names[1].hex()}*")
    content = bytearray(longest.read_bytes())
    content[-99] ^= 1
    longest.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="left out.*not those that were saved.*damaged"):
        count, state = cache.longest(names)
    assert (count, number(state)) == (1, 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_of_another_model_is_refused(model):
    cache = PrefixCache(talking_model().double(), PLENTY)
    with pytest.raises(ValueError, match="cache: it was made for other weights, or another dtype"):
        Engine(model, slots=1, cache=cache)


def test_what_a_killed_process_left_half_written_is_removed(model, tmp_path):
    name = f".{'ab' * 32}.prefix.safetensors"
    old, new = tmp_path / f"{name}.0123abcd.tmp", tmp_path / f"{name}.4567abcd.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    PrefixCache(model, PLENTY, tmp_path, PLENTY)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize("name", ["memory_bytes", "disk_bytes"])
def test_bounds_that_are_none(model, tmp_path, name):
    sizes = {"memory_bytes": 1, "disk_bytes": 1}
    with pytest.raises(TypeError, match=f"{name}: expected an int, found '1GB'"):
        PrefixCache(model, folder=tmp_path, **(sizes | {name: "1GB"}))
    with pytest.raises(ValueError, match=f"{name}: expected at least 0, found -1"):
        PrefixCache(model, folder=tmp_path, **(sizes | {name: -1}))
