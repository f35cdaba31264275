"""Many texts at once: each row bit for bit what it is alone, whatever stands beside it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rwkv7.sampling import Sampler, batch, probabilities, sample_batch

V = 300
CUTS = [
    *((1.0, 0, 1.0, 0.0), (0.7, 0, 0.8, 0.0), (1.7, 9, 1.0, 0.0), (1.3, 40, 0.9, 0.0)),
    *((0.9, 0, 1.0, 0.2), (2.5, 60, 0.99, 0.01), (1.0, 999, 0.0, 0.0)),
]
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "presence": 0.7, "frequency": 0.3, "decay": 0.9},
    *(
        {"temperature": t, "top_k": k, "top_p": p, "min_p": m, "order": order}
        for t, k, p, m in CUTS
        for order in ("rwkv", "hf")
    ),
    {"top_p": 0.6, "presence": 2.0, "frequency": 0.2, "decay": 0.996, "exempt": [1, 2]},
]
ROWS = len(SETTINGS)


def samplers(settings=SETTINGS):
    return [Sampler(seed=seed, **chosen) for seed, chosen in enumerate(settings)]


def logits_of(step, rows=ROWS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(rows, V, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 is full of ties
@pytest.mark.parametrize("few", [16, 1024])
def test_a_row_is_the_same_alone_and_in_any_company(monkeypatch, dtype, few):
    monkeypatch.setattr(batch, "_FEW", few)
    together, alone, reversed_, pairs = (samplers() for _ in range(4))
    for step in range(12):
        logits = logits_of(step, dtype=dtype)
        expected = [s.sample(row) for s, row in zip(alone, logits, strict=True)]
        assert sample_batch(logits, together) == expected
        assert sample_batch(logits.flip(0), reversed_[::-1]) == expected[::-1]
        found = [
            token
            for start in range(0, len(expected), 2)
            for token in sample_batch(logits[start : start + 2], pairs[start : start + 2])
        ]
        assert found == expected
    states = [[s.state_dict() for s in group] for group in (together, alone, reversed_, pairs)]
    assert all(state == states[0] for state in states)


def test_how_many_are_looked_at_first_changes_nothing(monkeypatch):
    expected = [sample_batch(logits_of(step), samplers()) for step in range(8)]
    for few in (1, 3, 50):
        monkeypatch.setattr(batch, "_FEW", few)
        assert [sample_batch(logits_of(step), samplers()) for step in range(8)] == expected


def test_the_draws_differ_and_follow_the_probabilities():
    logits = logits_of(0, 1)[0] / 3
    sampler = Sampler(0.9, 5, 0.9, seed=3)
    expected = probabilities(logits, sampler)
    count = 3000
    seeded = [Sampler(0.9, 5, 0.9, seed=seed) for seed in range(count)]
    tokens = sample_batch(logits.expand(count, -1), seeded)
    drawn = torch.bincount(torch.tensor(tokens), None, V)
    assert not drawn[expected == 0].any()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((drawn / count - expected).abs() <= 4 * deviation).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_its_own_affair(bad):
    logits, whole = logits_of(0), logits_of(0)
    for row in (1, 3, 7):
        if bad == -math.inf:
            logits[row] = bad
        else:
            logits[row, 17] = bad
    group, expected = samplers(), samplers()
    before = [s.state_dict() for s in group]
    found = sample_batch(logits, group)
    for row, token in enumerate(sample_batch(whole, expected)):
        assert found[row] == (None if row in (1, 3, 7) else token)
    for row in (1, 3, 7):
        assert group[row].state_dict() == before[row]
        assert bool(probabilities(logits[row], group[row]).isnan().all())


def test_logits_are_not_changed():
    logits, group = logits_of(0), samplers()
    before = logits.clone()
    for _ in range(3):
        sample_batch(logits, group)
    assert torch.equal(logits, before)


def test_ties_at_the_edge_stay_together():
    logits = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 0.0])
    for order, settings in itertools.product(("rwkv", "hf"), ({"top_k": 3}, {"top_p": 0.9})):
        kept = probabilities(logits, Sampler(order=order, **settings)) > 0
        assert kept.tolist() == [True, True, True, True, True, False]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
def test_extreme_temperatures(temperature):
    for order in ("rwkv", "hf"):
        p = probabilities(logits_of(0)[0], Sampler(temperature, order=order))
        assert float(p.sum()) == pytest.approx(1)
        assert float(p.max()) == pytest.approx(1 if temperature < 1 else 1 / V, rel=1e-6)


def test_no_rows():
    assert sample_batch(torch.empty(0, 5), []) == []


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"logits: expected \[B, V\] in floating"):
        sample_batch(torch.zeros(3), [Sampler()])
    with pytest.raises(ValueError, match=r"logits: expected \[B, V\] in floating"):
        sample_batch(torch.zeros(1, 3, dtype=torch.int64), [Sampler()])
    with pytest.raises(ValueError, match="one for each of 2 rows, found 1"):
        sample_batch(torch.zeros(2, 3), [Sampler()])
    one = Sampler()
    with pytest.raises(ValueError, match="found one twice"):
        sample_batch(torch.zeros(2, 3), [one, one])
    one = Sampler(presence=1.0)
    one.accept(7)
    with pytest.raises(ValueError, match="the token 7, outside the vocabulary of 3"):
        one.sample(torch.zeros(3))


@pytest.mark.gpu
def test_on_a_gpu_the_same_tokens_and_one_wait():
    together, alone, host = samplers(), samplers(), samplers()
    for step in range(12):
        logits = logits_of(step)
        device = logits.cuda()
        torch.cuda.synchronize()
        found = sample_batch(device, together)
        assert [s.sample(row) for s, row in zip(alone, device, strict=True)] == found
        assert sample_batch(logits, host) == found
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch._draw(device, samplers(), 1024)
    finally:
        torch.cuda.set_sync_debug_mode("default")
