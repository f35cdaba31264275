"""`rwkv7 chat` with lines from a pipe: answers on stdout, commands, and mistakes in words."""

from __future__ import annotations

import io
import signal
import sys

import pytest
from talking_model import talking_model

from rwkv7.cli import main
from rwkv7.generate import Session
from rwkv7.weights import save_model

SETTINGS = ("--tokens", "10", "--seed", "3", "--template", "paragraphs", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "talking.safetensors"
    save_model(talking_model(), path)
    return path


@pytest.fixture
def talk(checkpoint, capfd, monkeypatch, tmp_path):
    """Say these lines: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*lines, options=SETTINGS):
        typed = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        with pytest.raises(SystemExit) as ended:
            main(["chat", str(checkpoint), *options])
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_answers_go_to_stdout_and_the_rest_to_stderr(talk):
    code, out, err = talk("aé", "", "b", "/help", "/quit", "never read")
    assert code == 0
    assert err.count(" tokens, ") == 2
    assert "/retry" in err
    assert "/retry" not in out
    assert out == talk("aé", "b")[1]


def test_save_and_load_are_an_uninterrupted_chat(talk):
    whole = talk("aé", "b", "€")[1]
    first = talk("aé", "/save one")[1]
    assert first + talk("/load one", "b", "€")[1] == whole
    again = talk("aé", "/save two", "something else", "/load two", "b", "€")[1]
    assert again.startswith(first)
    assert again.endswith(whole.removeprefix(first))
    begun = talk("b", "€", options=(*SETTINGS[:2], *SETTINGS[4:], "--load", "one"))[1]
    assert first + begun == whole


def test_retry_begins_from_the_same_state(talk):
    talk("aé", "/retry", "/save retried")
    talk("aé", "/save once")
    model = talking_model()
    retried, once = (
        Session.load(f"{name}.chat.safetensors", model) for name in ("retried", "once")
    )
    assert retried.sampler.draws == 2 * once.sampler.draws == 20
    greedy = (*SETTINGS, "--temperature", "0")
    code, out, _ = talk("aé", "/retry", options=greedy)
    assert (code, out) == (0, talk("aé", options=greedy)[1] * 2)


def test_fork_back_and_reset(talk):
    once = talk("aé", "b")[1]
    first = talk("aé")[1]
    branched = talk("aé", "/fork", "b", "/back", "b")[1]
    assert branched == once + once.removeprefix(first)
    assert talk("aé", "/reset", "aé")[1] == first * 2


def test_ctrl_c_stops_the_answer_and_not_the_chat(talk, monkeypatch):
    plain = Session.run

    def interrupted(self, *arguments):
        for count, token in enumerate(plain(self, *arguments)):
            if count == 3:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(Session, "run", interrupted)
    code, _, err = talk("aé", "b")
    assert code == 0
    assert err.count("4 tokens") == err.count("stopped") == 2


def test_mistakes_in_commands_are_told_and_the_chat_goes_on(talk):
    lines = ("/save", "/load nothing", "/retry", "/back", "/dance", "aé")
    code, out, err = talk(*lines)
    assert code == 0
    assert out == talk("aé")[1]
    for words in (
        "/save: expected a name",
        "error: nothing.chat.safetensors: No such file",
        "retry: expected an answer",
        "/back: expected a /fork",
        "/dance: no such command",
    ):
        assert words in err


def test_mistakes_in_the_call_are_one_line(talk):
    code, out, err = talk("aé", options=("--template", "alpaca"))
    assert (code, out) == (2, "")
    assert "template: expected one of" in err.splitlines()[-1]
    code, out, err = talk("aé", options=("--load", "nothing", "--device", "cpu"))
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_message_that_is_not_utf8_is_said_as_it_is(talk):
    code, out, err = talk("a\udcff\udcfe", "b")
    assert code == 0
    assert err.count(" tokens, ") == 2
    assert out == talk("a\udcff\udcfe", "b")[1] != talk("a", "b")[1]


def test_a_stdin_that_is_closed(checkpoint, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(checkpoint)])
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "error: chat: expected messages on stdin, found it closed\n")
