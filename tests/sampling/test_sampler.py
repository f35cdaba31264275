"""Sampling: the three cuts and their order, repeatability, and what a session keeps of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from rwkv7.sampling import Sampler, probabilities, sample_batch

LOGITS = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()


def kept(logits=LOGITS, **settings) -> set[int]:
    return set((probabilities(logits, Sampler(**settings)) > 0).nonzero().flatten().tolist())


def shares(count=4000, **settings) -> list[float]:
    """How often each token came, drawn once by each of many seeds."""
    samplers = [Sampler(seed=seed, **settings) for seed in range(count)]
    tokens = sample_batch(LOGITS.expand(count, -1), samplers)
    return [tokens.count(token) / count for token in range(len(LOGITS))]


def test_draws_follow_the_probabilities():
    sampler = Sampler(seed=1)
    tokens = [sampler.sample(LOGITS) for _ in range(400)]
    for count, found in (
        (400, [tokens.count(token) / 400 for token in range(4)]),
        (4000, shares()),
    ):
        for share, p in zip(found, LOGITS.exp().tolist(), strict=True):
            assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


def test_temperature_zero_is_greedy_and_draws_nothing():
    sampler = Sampler(temperature=0)
    assert sampler.sample(LOGITS) == 0
    assert sampler.sample(torch.tensor([1.0, 7.0, 7.0])) == 1
    assert sampler.draws == 0


def test_temperature_sharpens():
    squares = LOGITS.double().exp().square()
    found = probabilities(LOGITS, Sampler(0.5))
    assert float((found - squares / squares.sum()).norm()) < 1e-6
    assert shares(temperature=0.5)[0] == pytest.approx(float(found[0]), abs=0.03)
    assert shares(100, temperature=1e-6)[0] == 1


def test_top_k_keeps_the_most_probable():
    assert kept(top_k=2) == {0, 2}
    assert kept(top_k=99) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it():
    assert kept(top_p=0.0) == {0}
    assert kept(top_p=0.49) == {0}
    assert kept(top_p=0.6) == {0, 2}
    assert kept(top_p=0.9) == {0, 2, 3}


def test_top_p_keeps_ties_with_the_last():
    assert kept(logits=torch.zeros(4), top_p=0.3) == {0, 1, 2, 3}


def test_top_p_comes_before_temperature():
    # Flattened first, the four would be almost equal and 0.6 would need three of them.
    assert kept(temperature=20.0, top_p=0.6) == {0, 2}


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert kept(logits, temperature=5.0) == {1}


def test_one_seed_gives_one_sequence():
    def sequence(seed):
        sampler = Sampler(seed=seed)
        return [sampler.sample(LOGITS) for _ in range(40)]

    assert sequence(3) == sequence(3)
    assert sequence(3) != sequence(4)
    assert Sampler().seed != Sampler().seed


def test_these_draws_are_the_same_on_every_machine():
    sampler = Sampler(seed=2024)
    found = [sampler.sample(LOGITS) for _ in range(12)]
    assert found == [2, 1, 0, 2, 0, 0, 2, 0, 2, 0, 3, 1]


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_saved_sampler_goes_on_where_it_stopped(cut):
    penalties = {"presence": 0.4, "frequency": 0.3, "decay": 0.9, "exempt": [2], "order": "hf"}
    whole, first = (Sampler(0.8, 3, 0.9, seed=5, **penalties) for _ in range(2))
    expected = [whole.sample(LOGITS) for _ in range(20)]
    found = [first.sample(LOGITS) for _ in range(cut)]
    rest = Sampler.from_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [rest.sample(LOGITS) for _ in range(20 - cut)] == expected
    assert rest.state_dict() == whole.state_dict()


def test_a_draw_needs_no_draw_before_it():
    sampler, late = Sampler(seed=7), Sampler(seed=7)
    for n in range(150):
        late.draws = n
        assert sampler.uniform() == late.uniform()
        assert Sampler.from_state_dict(sampler.state_dict()).uniform() == late.uniform()
        sampler.accept(0)


def test_min_p_compares_with_the_most_probable():
    assert kept(min_p=0.31) == {0, 2}
    assert kept(min_p=1.0) == {0}
    # At temperature 4 the four are within a factor of 1.8 of each other, which only "hf" sees.
    assert kept(min_p=0.5, temperature=4.0) == {0, 2}
    assert kept(min_p=0.5, temperature=4.0, order="hf") == {0, 1, 2, 3}


def test_the_order_decides_what_top_p_sees():
    assert kept(temperature=20.0, top_p=0.6, order="rwkv") == {0, 2}
    assert kept(temperature=20.0, top_p=0.6, order="hf") == {0, 2, 3}
    # "hf" shares out what top-k left: 0.5 and 0.3 become 0.625 and 0.375.
    assert kept(top_k=2, top_p=0.6, order="hf") == {0}
    assert kept(top_k=2, top_p=0.6, order="rwkv") == {0, 2}


def test_penalties_by_hand():
    sampler = Sampler(0, presence=1.0, frequency=0.5, decay=0.5, exempt=[2])
    logits = torch.tensor([3.0, 2.4, 2.9, -9.0])
    assert sampler.sample(logits) == 0  # then 0 pays 1.5
    assert sampler.sample(logits) == 2  # 0 has 1.75, 2 pays 1: its count stays 0
    assert sampler.counts == {0: 0.5, 2: 0.0}
    assert sampler.sample(logits) == 1  # against 1.75 and 1.9
    assert sampler.counts == {0: 0.25, 2: 0.0, 1: 1.0}
    sampler.forget()
    assert sampler.counts == {}
    assert sampler.sample(logits) == 0


def test_no_penalty_keeps_no_counts():
    sampler = Sampler(seed=1)
    sampler.sample(LOGITS)
    assert sampler.counts == {}


def test_many_tokens_are_counted():
    sampler = Sampler(presence=1.0, seed=1)
    for token in [*range(100), *range(50)]:
        sampler.accept(token)
    assert sampler.counts == {token: 2.0 if token < 50 else 1.0 for token in range(100)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_and_no_change_to_the_logits(dtype):
    logits = LOGITS.to(dtype)
    before = logits.clone()
    Sampler(seed=0, top_k=2, top_p=0.7).sample(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected"),
        ({"temperature": math.nan}, "temperature: expected"),
        ({"top_k": -1}, "top_k: expected"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"min_p": -0.1}, "min_p: expected"),
        ({"decay": 1.01}, "decay: expected"),
        ({"presence": math.nan}, "presence: expected"),
        ({"frequency": math.inf}, "frequency: expected"),
        ({"order": "openai"}, 'order: expected "rwkv" or "hf"'),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 2**64}, "seed: expected"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers(bad):
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits: expected numbers"):
            Sampler(temperature).sample(torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(ValueError, match="logits: expected numbers, found -inf"):
        Sampler().sample(torch.full((3,), -math.inf))
    with pytest.raises(ValueError, match=r"logits: expected \[V\]"):
        Sampler().sample(torch.zeros(1, 3))


@pytest.mark.parametrize(
    "change",
    [
        *({"draws": -1}, {"draws": "3"}, {"seed": 0.5}, {"top_p": None}, {"more": 1}),
        *({"counts": 3}, {"counts": [[1]]}, {"counts": [[1, math.nan]]}, {"counts": [[-1, 2]]}),
        *({"exempt": 3}, {"exempt": ["a"]}, {"order": "x"}, {"decay": -1}),
    ],
)
def test_a_broken_saved_sampler_is_refused(change):
    state = {**Sampler(seed=1).state_dict(), **change}
    with pytest.raises(ValueError, match="(sampler|order|decay): "):
        Sampler.from_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": "1"}, "temperature: expected a number, found '1'"),
        ({"temperature": None}, "temperature: expected a number, found None"),
        ({"top_k": 1.5}, r"top_k: expected an int, found 1\.5"),
        ({"top_p": "0.9"}, "top_p: expected a number"),
        ({"min_p": None}, "min_p: expected a number"),
        ({"presence": "a"}, "presence: expected a number"),
        ({"decay": True}, "decay: expected a number, found True"),
        ({"seed": 1.5}, "seed: expected an int"),
    ],
)
def test_settings_that_are_no_numbers_are_named(settings, words):
    with pytest.raises(TypeError, match=words):
        Sampler(**settings)


def test_numbers_of_numpy_are_kept_as_plain_ones():
    sampler = Sampler(np.float32(0.5), np.int64(3), seed=np.int64(7), presence=np.float32(0.25))
    about = json.loads(json.dumps(sampler.state_dict()))
    assert (about["temperature"], about["top_k"], about["seed"]) == (0.5, 3, 7)
