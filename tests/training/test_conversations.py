"""Conversations: the template, what is learnt of them, and that neighbours in a step never meet."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_model import random_model
from torch.nn import functional

from rwkv7 import save_model
from rwkv7.config import ModelConfig
from rwkv7.tokenizer import ByteTokenizer, WorldTokenizer
from rwkv7.training import TrainSettings, resume_training, train_model, tune_model
from rwkv7.training.batch import IGNORED
from rwkv7.training.data import find_text, prepare_chat
from rwkv7.training.data.chat import ChatData, chat_parts
from rwkv7.training.evaluate import evaluate_answers
from rwkv7.training.loss import next_token_loss
from rwkv7.training.sources import PackedConversations

BYTES = ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8)
ANSWERS = ["Four.", "Paris, of course.", "I do not know", "Seven,\n\nI think.", "No.", "Blue", "9"]


def say(question: str, answer: str, *more: str) -> dict[str, Any]:
    roles = ("user", "assistant") * 4
    contents = (question, answer, *more)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]}


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    lines = [say(f"Question {n}?", answer) for n, answer in enumerate(ANSWERS)]
    lines[2] = say("Well?", ANSWERS[2], "Why?", "So it is.")
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path, chat_file: Path) -> ChatData:
    return prepare_chat(find_text([chat_file]), tmp_path / "data", ByteTokenizer(), 5)


def test_the_template_and_what_is_learnt_of_it() -> None:
    messages = [
        {"role": "system", "content": " Be brief.\r\n\r\n\r\nAlways. "},
        {"role": "user", "content": "2 + 2?\n\nAssistant: 5"},
        {"role": "assistant", "content": "Four."},
    ]
    assert chat_parts(messages) == [
        ("System: Be brief.\nAlways.\n\n", False),
        ("User: 2 + 2?\nAssistant: 5\n\n", False),
        ("Assistant:", False),
        (" Four.\n\n", True),
    ]


def test_marks_stand_at_what_the_assistant_says(data: ChatData) -> None:
    decode = ByteTokenizer().decode_bytes
    tokens, learnt = data.documents.tokens.document(2), data.documents.learnt.document(2)
    text = "User: Well?\n\nAssistant: I do not know\n\nUser: Why?\n\nAssistant: So it is.\n\n"
    assert decode(tokens.tolist()).decode() == text
    assert decode(tokens[learnt == 1].tolist()).decode() == " I do not know\n\n So it is.\n\n"
    # Two conversations at the end have the five bytes that were asked for.
    assert (len(data.documents), len(data.held_out)) == (5, 2)
    assert data.info.held_out_bytes == len(" Blue\n\n 9\n\n")
    assert data.info.train_bytes == data.info.train_tokens == 8 + 20 + 16 + 12 + 18 + 6


def test_with_the_world_vocabulary_the_end_of_a_conversation_is_learnt(
    tmp_path: Path, chat_file: Path
) -> None:
    tokenizer = WorldTokenizer()
    world = prepare_chat(find_text([chat_file]), tmp_path / "data", tokenizer, 0)
    tokens, learnt = world.documents.tokens.document(0), world.documents.learnt.document(0)
    assert tokens[-1] == 0 and learnt[-1] == 1 and len(world.held_out) == 0
    prompt = tokenizer.encode("User: Question 0?\n\n") + tokenizer.encode("Assistant:")
    assert tokens[: len(prompt)].tolist() == prompt and not learnt[: len(prompt)].any()


def test_every_conversation_comes_once_an_epoch_and_targets_are_what_is_learnt(
    data: ChatData,
) -> None:
    source = PackedConversations(data.documents, window=60, batch=2, seed=3)
    assert (source.cut, source.left_out) == (1, 0)
    seen, step = [], 0
    while len(seen) < 15:
        numbers = source.conversations(step)
        batch = source.batch(step)
        seen += numbers
        assert batch.inputs.shape[1] <= source.tokens_per_step
        borders = batch.cu_seqlens.tolist()
        assert batch.sequences == len(numbers)
        for number, start, stop in zip(numbers, borders[:-1], borders[1:], strict=True):
            ids = torch.from_numpy(data.documents.tokens.document(number).astype(np.int64))
            marks = torch.from_numpy(data.documents.learnt.document(number).astype(np.int64))
            size = stop - start
            assert torch.equal(batch.inputs[0, start:stop], ids[:size])
            targets = torch.where(marks[1 : size + 1] == 1, ids[1 : size + 1], IGNORED)
            assert torch.equal(batch.targets[0, start:stop], targets)
        step += 1
    epochs = [seen[:5], seen[5:10], seen[10:]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs) and epochs[0] != epochs[1]
    # A step is a function of its number alone.
    again = PackedConversations(data.documents, window=60, batch=2, seed=3)
    assert again.conversations(step - 1) == source.conversations(step - 1)


def test_a_conversation_feels_none_that_stands_beside_it(data: ChatData) -> None:
    model = random_model(BYTES)
    batch = PackedConversations(data.documents, window=100, batch=4, seed=0).batch(0)
    assert batch.sequences > 2
    features, _ = model.hidden(batch.inputs, cu_seqlens=batch.cu_seqlens)
    packed = next_token_loss(model.head, features, batch.targets)
    total, count, borders = 0.0, 0, batch.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(borders):
        logits, _ = model(batch.inputs[:, start:stop])
        targets = batch.targets[0, start:stop]
        total += functional.cross_entropy(logits[0], targets, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    assert packed.item() == pytest.approx(total / count, rel=1e-12)


def test_held_out_answers_are_charged_and_questions_are_not(data: ChatData) -> None:
    model = random_model(BYTES)
    result = evaluate_answers(model, data.held_out, ByteTokenizer())
    bits = 0.0
    for number in range(2):
        ids = torch.from_numpy(data.held_out.tokens.document(number).astype(np.int64))
        logp = model(ids[None])[0][0].log_softmax(-1)
        for place in np.flatnonzero(data.held_out.learnt.document(number)):
            bits -= logp[place - 1, ids[place]].item() / math.log(2)
    assert result.bytes == data.info.held_out_bytes and result.dropped is None
    assert result.carried == pytest.approx(bits / result.bytes, rel=1e-6)
    first = evaluate_answers(model, data.held_out, ByteTokenizer(), most=1)
    assert first.bytes == len(" Blue\n\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "hello"}', "line 2: messages: expected a list of .*, found none"),
        ('{"messages": 3}', "line 2: messages: expected a list of .*, found int"),
        ("{", "line 2: expected a JSON object"),
        ('{"messages": [{"role": "tool", "content": ""}]}', "role: expected one of .*'tool'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content: expected text, found int"),
        ('{"messages": [{"role": ["user"], "content": ""}]}', r"line 2: role: .*found \['user'\]"),
        ('{"messages": ["hello"]}', "line 2: role: expected one of .*, found None"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 2: .*found half of one"),
        ('{"messages": [{"role": "user", "content": "\\udcff"}]}', "line 2: .*found half of one"),
        ('{"messages": []}', "line 2: messages: .*assistant's at least"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "one of the assistant's at least"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(say("a", "b")) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        prepare_chat(find_text([path]), tmp_path / "data", ByteTokenizer())


def test_a_run_on_conversations_is_resumed_to_the_same_states(
    tmp_path: Path, chat_file: Path
) -> None:
    save_model(random_model(BYTES, torch.float32), tmp_path / "base.pth")
    given = {"chat": True, "tune": "state", "steps": 6, "window": 60, "batch": 2, "held_out": 5}
    runs = []
    for name, stop in (("whole", 0), ("cut", 2)):
        run = tmp_path / name
        base = tmp_path / "base.pth"
        tune_model(
            base, given, [chat_file], run, device="cpu", on_step=lambda r, s=stop: r.step == s
        )
        runs.append(run)
    result = resume_training(runs[1], texts=[chat_file], device="cpu")
    assert result.finished and result.evaluation is not None and result.evaluation.dropped is None
    one, other = (torch.load(run / "state.pth", weights_only=True) for run in runs)
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    chat_file.write_text(chat_file.read_text() + json.dumps(say("a", "b")) + "\n")
    with pytest.raises(ValueError, match="not the text that the run was begun with"):
        resume_training(runs[1], texts=[chat_file], device="cpu")
    with pytest.raises(ValueError, match="speaks within 4 tokens, found none"):
        tune_model(base, {**given, "window": 4}, [chat_file], tmp_path / "none", device="cpu")


def test_a_batch_of_more_than_all_conversations_needs_no_more_room(
    tmp_path: Path, chat_file: Path
) -> None:
    settings = TrainSettings(
        chat=True, steps=1, layers=1, width=16, head_size=8, window=60, batch=10**9, held_out=5
    )
    result = train_model(
        settings, [chat_file], tmp_path / "run", device="cpu", on_step=lambda _: True
    )
    assert result.step == 1
