"""A turn's name and text, and what is no message."""

from __future__ import annotations

import pytest

from rwkv7.turns import turn


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
        ({"role": "user", "content": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_what_is_no_message(message, words):
    with pytest.raises(ValueError, match=words):
        turn(message)
