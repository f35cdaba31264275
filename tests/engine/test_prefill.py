"""Reading prompts: bounded pieces, fair shares, and no more memory for a longer prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_model import SMALL, error, random_model, random_tokens, rows

from rwkv7.benchmark.clock import peak_mib
from rwkv7.engine import Engine, Request, memory_budget
from rwkv7.engine.prefill import ENOUGH, PATIENCE
from rwkv7.packing import pack
from rwkv7.sampling import Sampler

MODEL = random_model(dtype=torch.float32)


def state_after(engine, prompt):
    request = Request(prompt, max_tokens=0, keep=True)
    return engine.submit(request).result().session.state


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_prompt_in_pieces_leaves_the_state_of_one_call(deterministic):
    engine = Engine(MODEL, slots=3, max_prefill_tokens=70, deterministic=deterministic)
    others = [engine.submit(Request([i], max_tokens=30)) for i in range(2)]
    prompt = random_tokens(SMALL, 1001)
    with torch.no_grad():
        _, expected = MODEL(prompt[None, :-1])
    for x, y in zip(rows(state_after(engine, prompt)), rows(expected), strict=True):
        assert error(x, y) < 1e-5
    assert all(handle.result().tokens for handle in others)


def test_a_million_tokens_take_no_more_memory_than_a_thousand():
    engine = Engine(MODEL, slots=1, max_prefill_tokens=256)

    def peak(length):
        handle = engine.submit(Request(torch.zeros(length, dtype=torch.int64), max_tokens=1))
        engine.step()
        found = peak_mib(engine.step, torch.device("cpu"))
        handle.cancel()
        return found

    assert peak(1_000_000) <= 1.01 * peak(1000)


@pytest.mark.parametrize("deterministic", [False, True])
def test_long_prompts_share_the_reading_with_short_ones(deterministic):
    engine = Engine(MODEL, slots=3, max_prefill_tokens=30, deterministic=deterministic)
    long = [engine.submit(Request([1] * 10_000, max_tokens=1)) for _ in range(2)]
    short = engine.submit(Request([1] * 20, max_tokens=1))
    for _ in range(4):
        engine.step()
    assert short.done
    assert not any(handle.done for handle in long)


@pytest.mark.parametrize("deterministic", [False, True])
def test_more_prompts_than_tokens_a_step_all_come_through(deterministic):
    engine = Engine(MODEL, slots=9, max_prefill_tokens=2, deterministic=deterministic)
    handles = [engine.submit(Request([i] * (1 + i), max_tokens=1)) for i in range(9)]
    engine.run_until_idle()
    assert all(len(handle.result().tokens) == 1 for handle in handles)


def test_new_prompts_wait_for_each_other_but_not_for_long():
    engine = Engine(MODEL, slots=20)
    running = [engine.submit(Request([i], max_tokens=3 * PATIENCE)) for i in range(2 * ENOUGH)]
    engine.step()

    def steps_to_read(count):
        handles = [engine.submit(Request([1, 2, 3], max_tokens=1)) for _ in range(count)]
        for steps in itertools.count():
            if all(handle.done for handle in handles):
                return steps
            engine.step()

    assert steps_to_read(1) == 1 + PATIENCE
    assert steps_to_read(2) == 1
    assert not any(handle.done for handle in running)
    engine.run_until_idle()
    assert steps_to_read(1) == 1


def test_padded_batches_give_what_unpadded_prompts_give():
    tokens, lengths = random_tokens(SMALL, 3, 7), [4, 7, 1]
    for left in (False, True):
        mask = torch.zeros(3, 7, dtype=torch.bool)
        for row, length in enumerate(lengths):
            mask[row, 7 - length if left else 0 : 7 if left else length] = True
        packed, offsets = pack(tokens, mask)
        engine = Engine(MODEL, slots=3)
        starts = offsets.tolist()
        parts = [packed[0, a:b] for a, b in itertools.pairwise(starts)]
        handles = [engine.submit(Request(p, max_tokens=6, sampler=Sampler(0))) for p in parts]
        for handle, row, kept in zip(handles, tokens, mask, strict=True):
            expected = Engine(MODEL, slots=1).submit(
                Request(row[kept].tolist(), max_tokens=6, sampler=Sampler(0))
            )
            assert handle.result().tokens == expected.result().tokens


@pytest.mark.parametrize(("slots", "tokens"), [(3, 700), (40, 64)])
def test_the_budget_is_what_an_engine_takes(slots, tokens):
    budget = memory_budget(SMALL, slots, torch.float32, tokens)
    engine = Engine(MODEL, slots=slots, max_prefill_tokens=tokens)
    assert engine.budget == budget
    held = sum(x.numel() * x.element_size() for x in rows(engine._pool.state))
    assert budget.states == held == (slots + 1) * budget.state
    assert budget.weights == sum(p.numel() * 4 for p in MODEL.parameters())
    for _ in range(slots):
        engine.submit(Request(random_tokens(SMALL, 1 + tokens // slots), max_tokens=9))
    for _ in range(3):
        assert peak_mib(engine.step, torch.device("cpu")) * 2**20 <= budget.working


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[9, 2, 130, 700], [700], [3] * 8], ids=str)
def test_captured_calls_leave_the_states_of_plain_ones(lengths):
    model = random_model(dtype=torch.float32).to("cuda")
    prompts = [random_tokens(SMALL, length, seed=i) for i, length in enumerate(lengths)]
    found = []
    for graphs in (None, False):
        engine = Engine(model, slots=8, max_prefill_tokens=256, cuda_graphs=graphs)
        requests = (Request(prompt, max_tokens=0, keep=True) for prompt in prompts)
        handles = [engine.submit(request) for request in requests]
        found.append([handle.result().session.state for handle in handles])
    for captured, plain in zip(*found, strict=True):
        for x, y in zip(rows(captured), rows(plain), strict=True):
            assert error(x, y) < 1e-5
