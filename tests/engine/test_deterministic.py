"""deterministic=True: not one bit of a request depends on what runs beside it."""

from __future__ import annotations

import random

import pytest
import torch
from talking_model import talking_model

from rwkv7.engine import Engine, PrefixCache, Request
from rwkv7.engine import decoder as decoder_module
from rwkv7.engine import prefill as prefill_module
from rwkv7.engine.decoder import Decoder
from rwkv7.engine.pool import Pool
from rwkv7.engine.reader import Reader
from rwkv7.sampling import Sampler


@pytest.fixture(scope="module")
def model():
    return talking_model(layers=1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def placed(request, model):
    if request.param == "cpu":
        return model
    return talking_model(layers=1).to("cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(prefill_module, "PIECE", 8)


def requests(count=50):
    chance = random.Random(3)
    return [
        Request(
            [chance.randrange(256) for _ in range(chance.randint(1, 20))],
            max_tokens=chance.randint(1, 4),
            sampler=Sampler(0.0 if i % 2 else 1.0, seed=i),
            logprobs=2,
        )
        for i in range(count)
    ]


def build(model, slots=8, cache=None):
    return Engine(model, slots=slots, max_prefill_tokens=16, deterministic=True, cache=cache)


def alone(model):
    engine, found = build(model), []
    for request in requests():
        completion = engine.submit(request).result()
        found.append((completion.tokens, completion.logprobs))
    return found


def mixed(engine, seed):
    """All requests in random order at random times."""
    chance = random.Random(seed)
    order = list(enumerate(requests()))
    chance.shuffle(order)
    handles = {}
    for i, request in order:
        handles[i] = engine.submit(request)
        for _ in range(chance.choice((0, 0, 0, 1, 2))):
            engine.step()
    engine.run_until_idle()
    results = (handles[i].result() for i in range(len(handles)))
    return [(completion.tokens, completion.logprobs) for completion in results]


def test_alone_and_beside_others_every_bit_is_the_same(placed):
    expected = alone(placed)
    assert mixed(build(placed), 1) == expected
    cache = PrefixCache(placed, 1 << 30)
    assert mixed(build(placed, slots=13, cache=cache), 2) == expected
    assert mixed(build(placed, cache=cache), 3) == expected
    assert cache.hits > 10


@pytest.mark.gpu
def test_a_captured_step_gives_what_a_plain_one_gives():
    model = talking_model(layers=1).to("cuda", torch.bfloat16)
    found = []
    for graphs in (None, False):
        engine = Engine(model, slots=16, deterministic=True, cuda_graphs=graphs)
        handles = [engine.submit(request) for request in requests(24)]
        found.append([(h.result().tokens, h.result().logprobs) for h in handles])
    assert found[0] == found[1]


def test_without_fixed_widths_the_bits_differ(model, monkeypatch):
    """The comparison above can fail: on a width that treats rows unequally, it does."""
    monkeypatch.setattr(Decoder, "_rows_agree", lambda self: True)
    monkeypatch.setattr(Decoder, "_padding", unpadded)
    monkeypatch.setattr(Decoder, "_run", run_unpadded)
    assert mixed(build(model), 1) != alone(model)


def unpadded(self, width):
    return torch.zeros(2, width, dtype=torch.int64)


def run_unpadded(self, tokens, slots):
    return self._step(torch.tensor((tokens, slots)))


def test_rows_go_one_by_one_where_a_width_treats_them_unequally(model, monkeypatch):
    pool = Pool(model.config, 5, model.dtype, model.device)
    with torch.no_grad():
        assert Decoder(model, pool, True, False).widths == (16,)
        monkeypatch.setattr(decoder_module, "ROW_MULTIPLE", 5)
        agrees = Decoder(model, pool, True, False)
        monkeypatch.setattr(type(model), "step_", unequal(type(model).step_))
        decoder = Decoder(model, pool, True, False)
        logits = decoder([1, 2, 3], [4, 0, 2])
    assert agrees.widths in ((5,), (1,))
    assert decoder.widths == (1,)
    assert logits.shape == (3, 256)
    assert not bool(pool.state.layers[0].wkv[1].any())


def unequal(step):
    def stepped(self, tokens, pool, slots):
        return step(self, tokens, pool, slots) + torch.arange(len(tokens))[:, None]

    return stepped


def test_prompts_go_one_by_one_where_lanes_are_treated_unequally(model, monkeypatch):
    assert most_lanes(model) in (1, 8)
    hidden = type(model).hidden

    def unequal(self, tokens, state, offsets):
        features, state = hidden(self, tokens, state, offsets)
        state.layers[0].wkv[2] += 1e-3
        return features, state

    monkeypatch.setattr(type(model), "hidden", unequal)
    assert most_lanes(model) == 1


def most_lanes(model):
    pool = Pool(model.config, 4, model.dtype, model.device)
    return Reader(model, pool, 64, 8, graphs=False).most


def test_a_call_has_fewer_lanes_only_where_the_bits_are_the_same(model, monkeypatch):
    if most_lanes(model) == 1:
        pytest.skip("here lanes are treated unequally")
    hidden, calls = type(model).hidden, []

    def by_size(self, tokens, state, offsets):
        features, state = hidden(self, tokens, state, offsets)
        calls.append(tokens.shape[1])
        if tokens.shape[1] == 16:
            state.layers[0].wkv[0] += 1e-3
        return features, state

    monkeypatch.setattr(type(model), "hidden", by_size)
    engine = build(model, slots=20)
    reader = Reader(model, engine._pool, 64, 8, graphs=False)
    calls.clear()
    with torch.no_grad():
        for count in (1, 2, 5):
            reader([torch.arange(3)] * count, range(count))
    assert 16 not in calls and calls[-1] == 64 and calls[0] in (8, 32, 64)
