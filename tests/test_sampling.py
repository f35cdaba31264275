"""Sampling: the three cuts and their order, repeatability, and what a session keeps of it."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

from rwkv7.sampling import Sampler

LOGITS = torch.tensor([0.5, 0.05, 0.3, 0.15]).log()


def drawn(count=4000, logits=LOGITS, **settings) -> dict[int, float]:
    sampler = Sampler(seed=1, **settings)
    counts = Counter(sampler.sample(logits) for _ in range(count))
    return {token: number / count for token, number in sorted(counts.items())}


def test_draws_follow_the_probabilities():
    shares = drawn()
    for token, p in enumerate(LOGITS.exp().tolist()):
        assert shares[token] == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))


def test_temperature_zero_is_greedy_and_draws_nothing():
    sampler = Sampler(temperature=0)
    assert sampler.sample(LOGITS) == 0
    assert sampler.sample(torch.tensor([1.0, 7.0, 7.0])) == 1
    assert sampler.draws == 0


def test_temperature_sharpens():
    shares = drawn(temperature=0.5)
    squares = LOGITS.double().exp().square()
    assert shares[0] == pytest.approx(float(squares[0] / squares.sum()), abs=0.03)
    assert set(drawn(50, temperature=1e-6)) == {0}


def test_top_k_keeps_the_most_probable():
    assert set(drawn(top_k=2)) == {0, 2}
    assert set(drawn(top_k=99)) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it():
    assert set(drawn(200, top_p=0.0)) == {0}
    assert set(drawn(200, top_p=0.49)) == {0}
    assert set(drawn(top_p=0.6)) == {0, 2}
    assert set(drawn(top_p=0.9)) == {0, 2, 3}


def test_top_p_keeps_ties_with_the_last():
    assert set(drawn(logits=torch.zeros(4), top_p=0.3)) == {0, 1, 2, 3}


def test_top_p_comes_before_temperature():
    # Flattened first, the four would be almost equal and 0.6 would need three of them.
    assert set(drawn(temperature=20.0, top_p=0.6)) == {0, 2}


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert set(drawn(200, logits, temperature=5.0)) == {1}


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
    assert found == [2, 2, 0, 2, 0, 0, 2, 0, 3, 0, 1, 2]


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_saved_sampler_goes_on_where_it_stopped(cut):
    whole, first = Sampler(0.8, 3, 0.9, seed=5), Sampler(0.8, 3, 0.9, seed=5)
    expected = [whole.sample(LOGITS) for _ in range(20)]
    found = [first.sample(LOGITS) for _ in range(cut)]
    rest = Sampler.from_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [rest.sample(LOGITS) for _ in range(20 - cut)] == expected


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
    "change", [{"draws": -1}, {"draws": "3"}, {"seed": 0.5}, {"top_p": None}, {"more": 1}]
)
def test_a_broken_saved_sampler_is_refused(change):
    state = {**Sampler(seed=1).state_dict(), **change}
    with pytest.raises(ValueError, match="sampler: "):
        Sampler.from_state_dict(state)
