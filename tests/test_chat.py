"""Conversations: what the model reads, where answers end, and that the past is exact."""

from __future__ import annotations

import pytest
import torch
from random_model import rows
from talking_model import talking_model

from rwkv7.chat import Chat
from rwkv7.generate import Session
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import get_tokenizer
from rwkv7.turns import turn

BYTE = get_tokenizer("byte")


@pytest.fixture(scope="module")
def model():
    return talking_model()


def chat(model, template="plain", **settings):
    settings = {"presence": 0.3, "decay": 0.9, "seed": 5} | settings
    return Chat(model, BYTE, template, Session(Sampler(**settings)))


class Scripted(Session):
    """A session whose model says what it is told to, and writes down all that it reads."""

    def run(self, model, max_tokens, stop=()):
        for token in self.script.pop(0)[:max_tokens]:
            self.token, self.ended = token, token in stop
            self.read.append(token)
            yield token

    def feed(self, model, tokens):
        self.token, self.ended = 0, False
        self.read.extend(tokens)


def scripted(template, *answers):
    session = Scripted(Sampler())
    session.read, session.script = [], [list(answer.encode()) for answer in answers]
    return Chat(None, BYTE, template, session), session


def same(first, second):
    assert first.token == second.token
    assert all(map(torch.equal, rows(first.state), rows(second.state)))


OPENINGS = {"think": " <think", "empty-think": " <think>\n</think"}
EMPTY_THINK = (" <think>\n</think>\nyes\n\nit is", ">\nyes\n\nit is\n\nUser:")


@pytest.mark.parametrize(
    ("template", "drawn", "shown", "read"),
    [
        ("plain", " yes\n\nno", " yes", " yes\n\nUser:"),
        ("plain", " a\nb\n\n", " a\nb", " a\nb\n\nUser:"),
        ("paragraphs", " a\n\nb\n\nUser: x", " a\n\nb", " a\n\nb\n\nUser:"),
        ("paragraphs", " a\n\nUs", " a\n\nUs", " a\n\nUser:"),
        ("think", "> so\n\nit is\n\nUser:", " <think> so\n\nit is", "> so\n\nit is\n\nUser:"),
        ("empty-think", ">\nyes\n\nit is\n\nUser:", *EMPTY_THINK),
        ("plain", " cut\n", " cut\n", " cut\n\nUser:"),
        ("plain", " é€𝄞", " é€𝄞", " é€𝄞\n\nUser:"),
    ],
)
def test_what_is_shown_and_what_the_model_reads(template, drawn, shown, read):
    talk, session = scripted(template, drawn, " 2\n\nUser:")
    assert "".join(talk.say(" hi\n\n \nthere ", 99)) == shown
    first = f"User: hi\nthere\n\nAssistant:{OPENINGS.get(template, '')}"
    assert bytes(session.read).decode() == first + read
    "".join(talk.say("more", 99))
    assert bytes(session.read).decode().startswith(first + read + " more\n\nAssistant:")


def test_no_piece_is_half_a_character_or_half_a_stop():
    talk, _ = scripted("paragraphs", " é\n\nUse 𝄞\n\nUser:")
    pieces = list(talk.say("hi", 99))
    assert pieces[:6] == [" ", "", "é", "", "", ""]
    assert "\n\nUse " in pieces
    assert "𝄞" in pieces
    assert talk.drawn == len(" é\n\nUse 𝄞\n\nUser:".encode())


def test_an_answer_closed_early_leaves_a_whole_conversation():
    for count in (0, 1, 3):
        talk, session = scripted("plain", " yes it is", " 2")
        pieces = talk.say("hi", 99)
        for _ in range(count):
            next(pieces)
        pieces.close()
        said = " yes it is"[:count]
        assert bytes(session.read).decode() == f"User: hi\n\nAssistant:{said}\n\nUser:"


def test_a_new_message_ends_the_answer_before():
    talk, session = scripted("plain", " yes", " no")
    next(talk.say("hi", 99))
    "".join(talk.say("ho", 99))
    expected = "User: hi\n\nAssistant: \n\nUser: ho\n\nAssistant: no\n\nUser:"
    assert bytes(session.read).decode() == expected


def test_retry_starts_from_the_state_of_the_first_try(model):
    talk, other = chat(model), chat(model)
    first = "".join(talk.say("aé", 12))
    draws = talk.session.sampler.draws
    again = "".join(talk.retry(12))
    assert again != first
    assert talk.session.sampler.draws == draws + 12
    # The same as if the first try had never been, with the random numbers of the second.
    other.session.sampler.draws = draws
    assert "".join(other.say("aé", 12)) == again
    same(talk.session, other.session)


def test_a_greedy_retry_says_the_same(model):
    talk = chat(model, temperature=0.0)
    first = "".join(talk.say("aé", 12))
    before = talk.session
    state, token = before.state, before.token
    assert "".join(talk.retry(12)) == first
    assert talk.session.token == token
    assert all(map(torch.equal, rows(talk.session.state), rows(state)))


def test_saved_and_loaded_is_uninterrupted(model, tmp_path):
    whole, first = chat(model), chat(model)
    for message in ("aé", "b"):
        assert "".join(whole.say(message, 9)) == "".join(first.say(message, 9))
    first.save(tmp_path / "s")
    rest = Chat(model, BYTE, "plain", Session.load(tmp_path / "s", model))
    for message in ("a", "€"):
        assert "".join(whole.say(message, 9)) == "".join(rest.say(message, 9))
    same(whole.session, rest.session)


def test_a_fork_goes_its_own_way(model):
    talk = chat(model)
    "".join(talk.say("aé", 9))
    twin = talk.fork()
    state = [x.clone() for x in rows(talk.session.state)]
    answer = "".join(twin.say("b", 9))
    assert all(map(torch.equal, rows(talk.session.state), state))
    assert "".join(talk.say("b", 9)) == answer
    same(talk.session, twin.session)


def test_the_past_is_not_read_again(model):
    talk, fed = chat(model), []
    "".join(talk.say("aé" * 20, 5))
    original = type(model).forward

    def counted(self, tokens, *arguments, **settings):
        fed.append(tokens.numel())
        return original(self, tokens, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", counted)
        "".join(talk.say("b", 3))
    assert sum(fed) <= len("User: b\n\nAssistant:" + "\n\nUser:") + 3


def test_what_is_refused(model):
    with pytest.raises(
        ValueError, match="template: expected one of plain, paragraphs, think, empty-think"
    ):
        chat(model, "alpaca")
    with pytest.raises(ValueError, match="message: expected some text"):
        chat(model).say(" \n", 9)
    with pytest.raises(ValueError, match="retry: expected an answer"):
        chat(model).retry(9)


def test_a_blank_line_does_not_end_a_turn():
    found = turn({"role": "system", "content": "\n a\r\n\r\n\r\nb\n \n"})
    assert found == ("System", "a\nb")
    assert turn({"role": "assistant", "content": ""}) == ("Assistant", "")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hello", "role: expected one of system, user, assistant, found None"),
        ({"role": ["user"], "content": ""}, "role: .*found \\['user'\\]"),
        ({"role": "user"}, "content: expected text, found NoneType"),
    ],
)
def test_what_is_no_message(message, words):
    with pytest.raises(ValueError, match=words):
        turn(message)
