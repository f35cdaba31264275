"""Scores of packed batches with forked states are those of one sequence at a time."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from random_model import SMALL, random_model

from rwkv7 import ModelConfig
from rwkv7.evaluation import evaluate_file, score, scores
from rwkv7.tokenizer import get_tokenizer

BYTE = get_tokenizer("byte")
CONTEXTS = [[3], [3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6, 7, 8], [9, 1], [3, 4, 5], [28, 2, 2, 2]]
CONTINUATIONS = [[1], [2, 3, 4], [7, 7, 7, 7, 7], []]
PAIRS = list(itertools.product(CONTEXTS, CONTINUATIONS))


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL).eval()


@pytest.fixture(scope="module")
def bytes_model():
    config = ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8)
    return random_model(config).eval()


def alone(model, context, continuation):
    """(log-probability, greedy) by one pass over the whole."""
    with torch.no_grad():
        logits, _ = model(torch.tensor([[*context, *continuation]]))
    log_p = logits[0].log_softmax(1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    found = [float(log_p[i, token]) for i, token in zip(places, continuation, strict=True)]
    greedy = all(int(log_p[i].argmax()) == t for i, t in zip(places, continuation, strict=True))
    return sum(found), greedy


@pytest.mark.parametrize(
    ("packed", "states", "logits"), [(8192, 64, 1 << 26), (7, 2, 60), (1, 1, 1)]
)
def test_each_score_is_that_of_the_pair_alone(monkeypatch, model, packed, states, logits):
    monkeypatch.setattr(scores, "PACKED_TOKENS", packed)
    monkeypatch.setattr(scores, "FORKED_STATES", states)
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", logits)
    likeliest = []
    for context in CONTEXTS:
        with torch.no_grad():
            likeliest.append((context, [int(model(torch.tensor([context]))[0][0, -1].argmax())]))
    pairs = [*PAIRS, *likeliest]
    for pair, found in zip(pairs, score(model, pairs), strict=True):
        expected, greedy = alone(model, *pair)
        assert found.log_probability == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert found.greedy == greedy
    assert sum(found.greedy for found in score(model, likeliest)) == len(likeliest)


def test_what_is_shared_is_read_once(monkeypatch, model):
    read = []
    plain = type(model).hidden

    def counted(self, tokens, *arguments):
        read.append(tokens.numel())
        return plain(self, tokens, *arguments)

    monkeypatch.setattr(type(model), "hidden", counted)
    shared = [5] * 200
    score(model, [([*shared, i], [j]) for i in range(5) for j in range(4)])
    assert sum(read) == 200 + 5 * 4


def test_what_is_shared_is_read_once_though_it_takes_many_batches(monkeypatch, model):
    read = []
    plain = type(model).hidden

    def counted(self, tokens, *arguments):
        read.append(tokens.numel())
        return plain(self, tokens, *arguments)

    shots = {shot: [shot] * 300 for shot in (3, 5)}  # as long as several batches of questions
    questions = [[i, j] for i in range(20) for j in range(3)]
    pairs = [([*shots[shot], *question, 1], [2]) for question in questions for shot in shots]
    expected = [alone(model, *pair)[0] for pair in pairs[:4]]
    monkeypatch.setattr(scores, "PACKED_TOKENS", 360)
    monkeypatch.setattr(type(model), "hidden", counted)
    found = [result.log_probability for result in score(model, pairs)]
    assert found[:4] == pytest.approx(expected, rel=1e-12)
    # The last questions of a beginning and the first of the next one may share a batch.
    assert sum(read) <= 3 * 300 + len(pairs) * 3


def test_nothing_to_score(model):
    assert score(model, []) == []
    with pytest.raises(ValueError, match="a context of at least one id"):
        score(model, [([], [1])])


def test_text(bytes_model, tmp_path):
    text = "In the beginning é".encode()
    (tmp_path / "a.txt").write_bytes(text)
    found = evaluate_file(bytes_model, BYTE, tmp_path / "a.txt")
    nats = math.log(256) - alone(bytes_model, text[:1], text[1:])[0]
    assert found["loss"] == pytest.approx(nats / len(text), rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(text)), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(nats / len(text) / math.log(2), rel=1e-12)
    assert (found["tokens"], found["bytes"]) == (len(text), len(text))


def test_text_after_an_end_of_document(tmp_path):
    pytest.importorskip("pyrwkv_tokenizer")
    config = ModelConfig.from_sizes(vocab_size=65536, width=8, layers=1, head_size=8)
    model, world = random_model(config).eval(), get_tokenizer("world")
    (tmp_path / "a.txt").write_bytes(b"In the beginning")
    ids = world.encode("In the beginning")
    found = evaluate_file(model, world, tmp_path / "a.txt")
    assert found["loss"] == pytest.approx(-alone(model, [0], ids)[0] / len(ids), rel=1e-12)


def written(path, tests):
    path.write_text("".join(json.dumps(test) + "\n\n" for test in tests), encoding="utf-8")
    return path


def test_choices(bytes_model, tmp_path):
    words = np.random.default_rng(0).permutation([" a", " bcd", " é", " xyz!", " no", " yes it is"])
    tests = [
        {"context": context, "choices": words[start : start + 3].tolist(), "answer": start % 3}
        for context in ("Is it? ", "Who", "")
        for start in range(4)
    ]
    found = evaluate_file(bytes_model, BYTE, written(tmp_path / "q.jsonl", tests))
    right = per_byte = 0
    for test in tests:
        context = test["context"].encode() or b"\n"
        choices = [choice.encode() for choice in test["choices"]]
        scores = [alone(bytes_model, context, choice)[0] for choice in choices]
        right += max(range(3), key=lambda i: scores[i]) == test["answer"]
        per_byte += max(range(3), key=lambda i: scores[i] / len(choices[i])) == test["answer"]
    assert 0 < right < len(tests)
    assert found["accuracy"] == right / len(tests)
    assert found["accuracy_per_byte"] == per_byte / len(tests)
    assert found["questions"] == len(tests)


def test_last_words(bytes_model, tmp_path):
    with torch.no_grad():
        guess = chr(int(bytes_model(torch.tensor([list(b"It was ")]))[0][0, -1, :128].argmax()))
    texts = ["It was the end", "Who is it?\n", f"It was  {guess}"]
    found = evaluate_file(
        bytes_model, BYTE, written(tmp_path / "l.jsonl", [{"text": text} for text in texts])
    )
    pairs = [(b"It was the", b" end"), (b"Who is", b" it?"), (b"It was ", f" {guess}".encode())]
    scores = [alone(bytes_model, *pair) for pair in pairs]
    assert found["accuracy"] == sum(greedy for _, greedy in scores) / 3
    assert found["perplexity"] == pytest.approx(math.exp(-sum(p for p, _ in scores) / 3), rel=1e-12)


def test_progress_is_told_to_the_end(bytes_model, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(bytes(range(32, 132)))
    written(tmp_path / "w.jsonl", [{"text": f"so it is {i}"} for i in range(3)])
    written(tmp_path / "q.jsonl", [GOOD, GOOD])
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 256 * 40)
    expected = {
        "a.txt": [(40, 99), (80, 99), (99, 99)],
        "w.jsonl": [(1, 3), (2, 3), (3, 3)],
        "q.jsonl": [(1, 4), (2, 4), (3, 4), (4, 4)],
    }
    told = []
    for name, steps in expected.items():
        evaluate_file(bytes_model, BYTE, tmp_path / name, lambda *step: told.append(step))
        assert told == steps
        told.clear()


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([json.dumps(GOOD), "{"], "line 2: not a JSON object"),
        (["[1]"], "line 1: not a JSON object"),
        ([json.dumps(GOOD), "", '{"text": "a b"}'], 'line 3: "context" should be a text'),
        ([json.dumps({**GOOD, "answer": 2})], "from 0 to 1, is 2"),
        ([json.dumps({**GOOD, "answer": True})], "from 0 to 1, is True"),
        ([json.dumps({**GOOD, "choices": ["b", ""]})], "none of them empty"),
        ([json.dumps({**GOOD, "choices": "bc"})], "none of them empty"),
        ([json.dumps({**GOOD, "choices": []})], '"choices" should hold at least one text'),
        (['{"text": "word"}'], "more than one word"),
        (['{"texts": 3}'], '"text" should be a text'),
        (["\xff"], "line 1: not a JSON object"),
        (['{"text": "a \\ud800"}'], '"text" should be a text'),
        ([], "expected a test in every line, found none"),
    ],
)
def test_wrong_lines_are_named(bytes_model, tmp_path, lines, words):
    path = tmp_path / "t.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match=f"t.jsonl.*{words}"):
        evaluate_file(bytes_model, BYTE, path)


def test_an_empty_text(bytes_model, tmp_path):
    (tmp_path / "e.txt").touch()
    with pytest.raises(ValueError, match="found an empty file"):
        evaluate_file(bytes_model, BYTE, tmp_path / "e.txt")
