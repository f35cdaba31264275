"""Requests that cannot be, and ids that the caller's `decode` does not know: told, and alone."""

from __future__ import annotations

import pytest
from talking_model import talking_model

from rwkv7.engine import Engine, Request
from rwkv7.generate import generate
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import ByteTokenizer

DECODE = ByteTokenizer().decode_bytes


@pytest.fixture(scope="module")
def model():
    return talking_model()


def test_an_id_without_text_ends_its_own_request_alone(model):
    prompt, length = list(b"so: a"), 8
    drawn = list(generate(model, prompt, None, Sampler(0, seed=0), length))

    def decode(ids):
        if drawn[3] in ids:
            raise ValueError("no such id")
        return DECODE(ids)

    engine = Engine(model, slots=2, decode=decode)
    fails = engine.submit(Request(prompt, max_tokens=length, sampler=Sampler(0, seed=0)))
    goes_on = engine.submit(Request(drawn[:1] * 5, max_tokens=2, sampler=Sampler(0, seed=0)))
    engine.run_until_idle()
    (failed,) = fails.results()
    assert failed.finish_reason == "error"
    assert failed.error == f"decode failed on the id {drawn[3]}: ValueError('no such id')"
    assert list(failed.tokens) == drawn[:3]
    assert goes_on.result().finish_reason == "length"
    assert engine.free_slots == 2


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"stop_strings": [5]}, TypeError, "stop_strings: expected a list of texts"),
        ({"stop_strings": [b"x"]}, TypeError, "stop_strings: expected a list of texts"),
        ({"stop_strings": None}, TypeError, "stop_strings: expected a list of texts"),
        ({"stop_strings": ["\ud800"]}, ValueError, "stop_strings: expected whole characters"),
        ({"stop_tokens": 5}, TypeError, "stop_tokens: expected a collection of ids, found 5"),
        ({"stop_tokens": None}, TypeError, "stop_tokens: expected a collection of ids"),
        ({"stop_tokens": "ab"}, TypeError, "stop_tokens: expected a collection of ids"),
        ({"stop_tokens": ["a"]}, TypeError, "stop_tokens: expected ids, found 'a'"),
        ({"timeout": "1"}, TypeError, "timeout: expected seconds, found '1'"),
        ({"sampler": "greedy"}, TypeError, "sampler: expected a Sampler, found 'greedy'"),
        ({"state": "x"}, TypeError, "state: expected a ModelState or a Session, found 'x'"),
    ],
)
def test_fields_of_other_kinds_are_named(model, fields, kind, words):
    with pytest.raises(kind, match=words):
        Engine(model, slots=1, decode=DECODE).submit(Request([1], **fields))


@pytest.mark.parametrize("name", ["slots", "max_prefill_tokens"])
def test_sizes_of_other_kinds_are_named(model, name):
    with pytest.raises(TypeError, match=rf"{name}: expected an int, found 2\.5"):
        Engine(model, **{name: 2.5})


@pytest.mark.parametrize("request_", [[1, 2], "text", None])
def test_what_is_no_request_is_named(model, request_):
    with pytest.raises(TypeError, match="request: expected a Request, found"):
        Engine(model, slots=1).submit(request_)
