"""The engine: requests come and go, and each gets what it would get alone."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from talking_model import REFRAIN, talking_model

from rwkv7.engine import Engine, Request, RequestFailed
from rwkv7.engine import prefill as prefill_module
from rwkv7.generate import generate
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import ByteTokenizer

DECODE = ByteTokenizer().decode_bytes


@pytest.fixture(scope="module")
def model():
    return talking_model()


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(prefill_module, "PIECE", 8)


def prompts(count, seed=0, longest=40):
    chance = random.Random(seed)
    return [
        [chance.randrange(256) for _ in range(chance.randint(1, longest))] for _ in range(count)
    ]


def sampler(seed):
    order, frequency = ("rwkv", "hf")[seed % 2], 0.3 * (seed % 4 == 1)
    temperature = 0.0 if seed % 3 == 0 else 1.0
    return Sampler(temperature, 20, 0.9, seed, frequency=frequency, decay=0.9, order=order)


def alone(model, prompt, seed, length):
    return tuple(generate(model, prompt, None, sampler(seed), length))


@pytest.mark.parametrize("slots", [1, 5])
def test_unequal_requests_give_what_they_give_alone(model, slots):
    engine = Engine(model, slots=slots, max_prefill_tokens=16)
    lengths = [1 + i % 13 for i in range(12)]
    handles = [
        engine.submit(Request(prompt, max_tokens=length, sampler=sampler(i)))
        for i, (prompt, length) in enumerate(zip(prompts(12), lengths, strict=True))
    ]
    engine.run_until_idle()
    for i, (handle, prompt) in enumerate(zip(handles, prompts(12), strict=True)):
        completion = handle.result()
        assert completion.tokens == alone(model, prompt, i, lengths[i]), i
        assert completion.finish_reason == "length"
    assert engine.free_slots == slots


def test_a_stream_gives_ids_and_text_as_they_come(model):
    engine = Engine(model, slots=2, decode=DECODE)
    other = engine.submit(Request(list(b"xy"), max_tokens=99, sampler=sampler(1)))
    handle = engine.submit(Request(list(REFRAIN), max_tokens=30, sampler=Sampler(0)))
    events = list(handle.stream())
    tokens = [token for event in events for token in event.tokens]
    assert tokens == list(generate(model, list(REFRAIN), None, Sampler(0), 30))
    assert "".join(event.text for event in events) == bytes(tokens).decode("utf-8", "replace")
    assert all("\ufffd" not in event.text for event in events[:-1])
    assert events[-1].finish_reason == "length"
    assert handle.done
    assert not other.done
    assert list(handle.stream()) == []


def test_a_long_prompt_is_read_in_pieces_while_others_draw(model):
    engine = Engine(model, slots=2, max_prefill_tokens=8)
    short = engine.submit(Request([1, 2], max_tokens=50))
    long = engine.submit(Request(prompts(1, longest=1)[0] * 801, max_tokens=1))
    stream = short.stream()
    for _ in range(50):
        next(stream)
    assert not long.done
    steps = 0
    while not long.done:
        engine.step()
        steps += 1
    assert steps > 40


def test_when_the_pool_is_full_requests_wait_their_turn(model):
    engine = Engine(model, slots=2)
    handles = [engine.submit(Request([i], max_tokens=3)) for i in range(5)]
    order = []
    while engine.step():
        order += [i for i, handle in enumerate(handles) if handle.done and i not in order]
    assert order + [4] * (4 not in order) == [0, 1, 2, 3, 4]


def test_samples_of_one_prompt_have_seeds_of_their_own(model):
    engine = Engine(model, slots=3)
    prompt = prompts(1)[0]
    handle = engine.submit(Request(prompt, max_tokens=9, sampler=sampler(4), n=3))
    found = [completion.tokens for completion in handle.results()]
    assert found == [alone_seeded(model, prompt, 4 + i) for i in range(3)]
    assert len(set(found)) == 3
    with pytest.raises(ValueError, match="n: expected at most 3 samples"):
        engine.submit(Request(prompt, n=4))


def alone_seeded(model, prompt, seed):
    about = {**sampler(4).state_dict(), "seed": seed}
    return tuple(generate(model, prompt, None, Sampler.from_state_dict(about), 9))


def test_stop_tokens_end_a_text(model):
    engine = Engine(model, slots=1, decode=DECODE)
    request = Request(list(b"aX"), max_tokens=99, sampler=Sampler(0), stop_tokens=[10])
    completion = engine.submit(request).result()
    assert completion.finish_reason == "stop"
    assert completion.tokens[-1] == 10
    assert completion.tokens.count(10) == 1
    assert "\n" not in completion.text


def test_stop_strings_end_a_text_and_no_part_of_them_comes(model):
    engine = Engine(model, slots=1, decode=DECODE)
    whole = engine.submit(Request(list(REFRAIN), max_tokens=60, sampler=Sampler(0))).result()
    stop = whole.text[20:24]
    cut = whole.text.index(stop)
    request = Request(
        list(REFRAIN), max_tokens=60, sampler=Sampler(0), stop_strings=["never", stop]
    )
    events = list(engine.submit(request).stream())
    given = ""
    for event in events:
        given += event.text
        assert whole.text[:cut].startswith(given)
    assert given == whole.text[:cut]
    assert events[-1].finish_reason == "stop"
    tokens = [token for event in events for token in event.tokens]
    assert DECODE(tokens).decode() == given
    with pytest.raises(ValueError, match="stop_strings: this engine knows no text"):
        Engine(model, slots=1).submit(request)


def test_log_probabilities_are_those_of_the_model(model):
    engine = Engine(model, slots=3)
    prompt = prompts(1)[0]
    others = [engine.submit(Request([i], max_tokens=20)) for i in range(2)]
    request = Request(prompt, max_tokens=5, sampler=sampler(1), logprobs=3)
    completion = engine.submit(request).result()
    tokens = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        log_p = model(tokens)[0][0, len(prompt) - 1 : -1].double().log_softmax(-1)
    for row, token, found in zip(log_p, completion.tokens, completion.logprobs, strict=True):
        assert found.token == token
        assert abs(found.logprob - float(row[token])) < 1e-4
        assert [token for token, _ in found.likeliest] == row.topk(3).indices.tolist()
    assert others[0].result().logprobs == ()


def test_cancelled_and_late_requests_give_what_they_had(model, monkeypatch):
    engine = Engine(model, slots=1)
    first = engine.submit(Request([1], max_tokens=99))
    late = engine.submit(Request([2], max_tokens=99, timeout=5.0))
    waiting = engine.submit(Request([3], max_tokens=99))
    for _ in range(4):
        engine.step()
    first.cancel()
    waiting.cancel()
    assert first.result().finish_reason == "cancelled"
    assert 0 < len(first.result().tokens) < 99
    assert waiting.result().tokens == ()
    engine.step()
    now = module_time()
    monkeypatch.setattr("time.monotonic", lambda: now + 6)
    engine.step()
    assert late.result().finish_reason == "timeout"
    assert engine.free_slots == 1


def module_time():
    import time

    return time.monotonic()


def test_a_client_that_goes_away_frees_its_slot(model):
    engine = Engine(model, slots=2)
    handle = engine.submit(Request([1], max_tokens=10**6))
    gone = engine.submit(Request([2], max_tokens=10**6))
    engine.step()
    assert engine.free_slots == 0
    del gone
    gc.collect()
    engine.step()
    assert engine.free_slots == 1
    for _ in handle.stream():
        break
    engine.step()
    assert engine.free_slots == 2
    assert handle.result().finish_reason == "cancelled"


def test_it_runs_in_a_thread_of_its_own(model):
    with Engine(model, slots=4) as engine:
        handles = [
            engine.submit(Request(prompt, max_tokens=8, sampler=sampler(i)))
            for i, prompt in enumerate(prompts(9))
        ]
        streamed = [token for event in handles[0].stream() for token in event.tokens]
        found = [handle.result().tokens for handle in handles]
        session = engine.submit(Request([1], max_tokens=10**6)).mark()
        assert session.token is not None
        for _ in engine.submit(Request([1], max_tokens=10**6)).stream():
            break
    assert not engine.has_thread
    assert tuple(streamed) == found[0]
    assert found == [alone(model, p, i, 8) for i, p in enumerate(prompts(9))]


def test_bad_requests_are_refused_before_anything_runs(model):
    engine = Engine(model, slots=2)
    for request, message in [
        ({"tokens": []}, "tokens: expected at least one id"),
        ({"tokens": [3, 256]}, "tokens: expected ids from 0 to 255, found 256"),
        ({"tokens": [-1]}, "found -1"),
        ({"tokens": torch.zeros(2, 2).long()}, r"tokens: expected ids \[T\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.submit(Request(**request))
    for tokens in ([0.5], "text", [True], [None], [[1], [1, 2]]):
        with pytest.raises(TypeError, match="tokens: expected"):
            engine.submit(Request(tokens))
    for name, value in [("n", 0), ("max_tokens", -1), ("timeout", -1.0), ("logprobs", -2)]:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Request([1], **{name: value})
    foreign = Sampler(presence=1.0)
    foreign.accept(256)
    with pytest.raises(ValueError, match="a vocabulary of 256, found the token 256"):
        engine.submit(Request([1], sampler=foreign))
    with pytest.raises(TypeError, match="stop_strings: expected a list"):
        Request([1], stop_strings="x")
    with pytest.raises(ValueError, match="slots: expected at least 1"):
        Engine(model, slots=0)
    assert not engine.step()


def test_a_request_whose_logits_are_nan_fails_alone():
    model = talking_model()
    with torch.no_grad():
        model.emb.weight[7] = torch.nan
    engine = Engine(model, slots=3, max_prefill_tokens=16)
    prompt = [1, 2, 3]
    broken = [
        engine.submit(Request([5, 7, 5], max_tokens=9)),
        engine.submit(Request([5, 7], max_tokens=9)),
    ]
    fine = engine.submit(Request(prompt, max_tokens=9, sampler=sampler(1)))
    later = engine.submit(Request(prompt, max_tokens=9, sampler=sampler(1)))
    engine.run_until_idle()
    expected = alone(model, prompt, 1, 9)
    assert fine.result().tokens == later.result().tokens == expected
    for handle in broken:
        with pytest.raises(RequestFailed, match="the model gave logits whose largest is nan"):
            handle.result()
        assert handle.results()[0].finish_reason == "error"
    assert engine.free_slots == 3


def test_a_machine_that_fails_ends_its_requests_and_the_engine_goes_on(model, monkeypatch):
    engine = Engine(model, slots=1)
    first = engine.submit(Request([1], max_tokens=9))
    second = engine.submit(Request([2], max_tokens=2))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "step_", failing)
        with pytest.raises(torch.OutOfMemoryError):
            engine.run_until_idle()
    assert first.results()[0].finish_reason == "error"
    assert len(second.result().tokens) == 2


def failing(*_):
    raise torch.OutOfMemoryError("no memory left")


def test_soak_thousand_requests_with_random_cancels():
    chance, model = random.Random(5), talking_model(layers=1)
    engine = Engine(model, slots=32, max_prefill_tokens=32)
    for length in range(1, 4):  # masks are made once and kept
        engine.submit(Request([1] * length, max_tokens=2)).result()
    tensors = count_tensors()
    handles = []
    for _ in range(1000):
        request = Request([chance.randrange(256)] * chance.randint(1, 3), max_tokens=2)
        handles.append(engine.submit(request))
        if chance.random() < 0.3:
            chance.choice(handles).cancel()
        if chance.random() < 0.2:
            del handles[chance.randrange(len(handles))]
        if chance.random() < 0.1:
            engine.step()
    engine.run_until_idle()
    assert engine.free_slots == 32
    assert {handle.result().finish_reason for handle in handles} == {"length", "cancelled"}
    del handles
    assert count_tensors() == tensors


def count_tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
