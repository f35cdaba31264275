"""`rwkv7 generate`: whole characters on stdout, sessions that go on, and mistakes in words."""

from __future__ import annotations

import io
import signal
import sys

import pytest
from talking_model import talking_model

from rwkv7.cli import main
from rwkv7.generate import Session
from rwkv7.weights import save_model

LENGTH = 22
SAMPLED = ("--temperature", "0.8", "--top-k", "30", "--top-p", "0.99", "--seed", "2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "talking.safetensors"
    save_model(talking_model(), path)
    return path


@pytest.fixture
def rwkv7(capfd):
    """Run the command: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def text(rwkv7, checkpoint, *arguments) -> str:
    code, out, err = rwkv7("generate", checkpoint, "--device", "cpu", *arguments)
    assert code == 0, err
    return out


def test_the_refrain_comes_in_whole_characters(rwkv7, checkpoint):
    out = text(rwkv7, checkpoint, "--prompt", "\n", "--temperature", 0, "--tokens", 24)
    assert out == "aé€𝄞b\naé€𝄞b\n"


@pytest.mark.parametrize("settings", [("--temperature", "0"), SAMPLED], ids=["greedy", "sampled"])
def test_cut_anywhere_the_text_is_the_same(rwkv7, checkpoint, tmp_path, settings):
    whole = text(rwkv7, checkpoint, "--prompt", "é", *settings, "--tokens", LENGTH)
    assert "€" in whole
    for cut in range(LENGTH + 1):
        session = tmp_path / f"{cut}"
        options = ("--prompt", "é", *settings, "--tokens", cut, "--state-out", session)
        first = text(rwkv7, checkpoint, *options)
        second = text(rwkv7, checkpoint, "--state-in", session, "--tokens", LENGTH - cut)
        assert first + second == whole, f"cut at {cut}"


def test_greedy_cuts_fall_inside_characters(checkpoint, rwkv7, tmp_path):
    pending = set()
    for cut in range(1, 13):
        options = ("--prompt", "\n", "--temperature", 0, "--tokens", cut)
        text(rwkv7, checkpoint, *options, "--state-out", tmp_path / "s")
        pending.add(Session.load(tmp_path / "s", talking_model()).pending)
    assert pending >= {b"", b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0", b"\xf0\x9d", b"\xf0\x9d\x84"}


def test_an_unfinished_character_ends_a_text_without_a_session(rwkv7, checkpoint):
    assert text(rwkv7, checkpoint, "--prompt", "\n", "--temperature", 0, "--tokens", 2) == "a\ufffd"


def test_a_prompt_is_appended_to_a_session(rwkv7, checkpoint, tmp_path):
    options = ("--prompt", "\n", "--temperature", 0, "--tokens", 3, "--state-out", tmp_path / "s")
    assert text(rwkv7, checkpoint, *options) == "aé"
    more = ("--state-in", tmp_path / "s", "--prompt", "𝄞", "--tokens", 3)
    assert text(rwkv7, checkpoint, *more) == "b\na"


def test_settings_of_a_session_can_be_replaced(rwkv7, checkpoint, tmp_path):
    text(
        rwkv7, checkpoint, "--prompt", "\n", *SAMPLED, "--tokens", 0, "--state-out", tmp_path / "s"
    )
    more = ("--state-in", tmp_path / "s", "--tokens", 12)
    assert text(rwkv7, checkpoint, *more, "--temperature", 0) == "aé€𝄞b\n"
    again = text(rwkv7, checkpoint, *more, "--seed", 5)
    assert again == text(rwkv7, checkpoint, "--prompt", "\n", *SAMPLED[:-1], 5, "--tokens", 12)


def test_penalties_of_a_session_go_on(rwkv7, checkpoint, tmp_path):
    options = ("--prompt", "a", "--temperature", 0, "--presence", 2, "--frequency", 1.5)
    options += ("--decay", 0.9, "--min-p", 0.01, "--order", "hf")
    whole = text(rwkv7, checkpoint, *options, "--tokens", LENGTH)
    assert whole != text(rwkv7, checkpoint, *options[:4], "--tokens", LENGTH)
    out = ("--tokens", 9, "--state-out", tmp_path / "s")
    first = text(rwkv7, checkpoint, *options, *out)
    rest = ("--state-in", tmp_path / "s", "--tokens", LENGTH - 9)
    assert first + text(rwkv7, checkpoint, *rest) == whole


def test_blanks_and_digits_are_not_counted_in_rwkvs_order(rwkv7, checkpoint, tmp_path):
    options = ("--presence", 1, "--tokens", 0, "--state-out", tmp_path / "s")
    text(rwkv7, checkpoint, *options)
    exempt = Session.load(tmp_path / "s", talking_model()).sampler.exempt
    assert exempt == set(b" \t0123456789")
    text(rwkv7, checkpoint, *options, "--order", "hf")
    assert not Session.load(tmp_path / "s", talking_model()).sampler.exempt


@pytest.mark.parametrize("piped", [False, True], ids=["file", "stdin"])
@pytest.mark.parametrize("prompt", [b"\n", b"so\r\nit \xc3", b"\xff\n", b""])
def test_a_prompt_from_a_file_is_read_to_its_last_byte(
    rwkv7, checkpoint, tmp_path, monkeypatch, prompt, piped
):
    (tmp_path / "p").write_bytes(prompt)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
    options = ("--temperature", 0, "--tokens", 12)
    found = text(rwkv7, checkpoint, "--prompt-file", "-" if piped else tmp_path / "p", *options)
    as_an_argument = prompt.decode("utf-8", "surrogateescape")
    assert found == text(rwkv7, checkpoint, "--prompt", as_an_argument, *options)


def test_without_a_prompt_it_starts_on_a_new_line(rwkv7, checkpoint):
    out = text(rwkv7, checkpoint, "--temperature", 0, "--tokens", 12)
    assert out == "aé€𝄞b\n"


def test_everything_but_the_text_is_on_stderr(rwkv7, checkpoint):
    code, out, err = rwkv7("generate", checkpoint, "--tokens", 3, *SAMPLED[:2], "--device", "cpu")
    assert code == 0
    assert "seed" not in out
    assert "3 tokens" in err
    assert "seed" in err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_the_session_and_nothing_is_lost(
    name, rwkv7, checkpoint, tmp_path, monkeypatch
):
    number = getattr(signal, name)
    usual = signal.getsignal(number)
    whole = text(rwkv7, checkpoint, "--prompt", "é", *SAMPLED, "--tokens", LENGTH)
    plain, drawn = Session.run, []

    def interrupted(self, *arguments):
        for token in plain(self, *arguments):
            drawn.append(token)
            if len(drawn) == 7:
                signal.raise_signal(number)
            yield token

    monkeypatch.setattr(Session, "run", interrupted)
    options = ("--prompt", "é", *SAMPLED, "--tokens", LENGTH, "--state-out", tmp_path / "s")
    code, first, err = rwkv7("generate", checkpoint, *options, "--device", "cpu")
    assert code == 130
    assert len(drawn) == 7
    assert "saved" in err
    second = text(rwkv7, checkpoint, "--state-in", tmp_path / "s", "--tokens", LENGTH - 7)
    assert first + second == whole
    assert signal.getsignal(number) is usual


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--temperature", "-1"), "temperature: expected"),
        (("--top-p", "2"), "top_p: expected"),
        (("--order", "mine"), 'order: expected "rwkv" or "hf"'),
        (("--state-out", "/nowhere/at/all/s"), "/nowhere/at/all/s: its folder"),
        (("--state-out", "/"), "/: is a folder"),
        (("--state-in", "/nowhere/s"), "/nowhere/s: No such file"),
        (("--prompt-file", "/nowhere/p"), "/nowhere/p: No such file"),
        (("--prompt-file", "/"), "/: Is a directory"),
        (("--prompt-file", "-", "--prompt", "a"), "--prompt-file: expected no --prompt"),
        (("--device", "abacus"), "device: 'abacus' cannot be used here"),
        (("--device", "cuda:77"), "device: 'cuda:77' cannot be used here"),
    ],
)
def test_mistakes_are_one_line(rwkv7, checkpoint, arguments, line):
    code, out, err = rwkv7("generate", checkpoint, "--tokens", 1, *arguments)
    assert (code, out) == (2, "")
    assert line in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_prompt_from_a_stdin_that_is_closed(rwkv7, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, out, err = rwkv7("generate", checkpoint, "--prompt-file", "-")
    assert (code, out) == (2, "")
    assert err == "error: --prompt-file -: expected text on stdin, found it closed\n"


def test_a_model_that_is_not_there(rwkv7, tmp_path):
    code, _, err = rwkv7("generate", tmp_path / "none.pth")
    assert code == 2
    assert err.startswith("error: ")
    assert "none.pth" in err
