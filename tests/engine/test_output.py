"""Stop strings: never a part of one given out, nothing else lost, wherever ids cut the text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7.engine.output import Output

VOCABULARY = [b"", b"a", b"b", b"ab", b"ba", b"aab", "é".encode(), "é".encode()[:1], b"\xa9"]
TOKENS = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=14)
STOPS = st.lists(st.sampled_from(["ab", "aba", "b", "é", "aé", "bb"]), max_size=3)


def decode(tokens):
    return b"".join(VOCABULARY[token] for token in tokens)


@settings(max_examples=300, deadline=None)
@given(TOKENS, STOPS)
def test_what_comes_is_what_stands_before_the_first_stop_string(tokens, stops):
    output = Output(decode, [], [stop.encode() for stop in stops])
    drawn, pieces = [], []
    for token in tokens:
        drawn.append(token)
        pieces.append(output.take(token))
        if output.stopped:
            break
    pieces.append(output.finish())
    whole = decode(drawn)
    places = [place for stop in stops if (place := whole.find(stop.encode())) >= 0]
    assert output.stopped == bool(places)
    expected = whole[: min(places)] if places else whole
    assert "".join(piece.text for piece in pieces) == expected.decode("utf-8", "replace")
    given_out = [token for piece in pieces for token in piece.tokens]
    assert given_out == drawn[: len(given_out)] == output.tokens
    assert expected.startswith(decode(given_out))
    if not places:
        assert given_out == drawn


def test_what_cannot_begin_a_stop_string_comes_at_once():
    output = Output(lambda tokens: bytes(tokens), [], [b"\nUser:"])
    texts = [output.take(byte).text for byte in b"yes\nUse it\nUser:"]
    assert texts[:3] == ["y", "e", "s"]
    assert texts[3:7] == [""] * 4
    assert texts[7] == "\nUse "
    assert output.stopped
    assert "".join(output.text) == "yes\nUse it"


def test_half_a_character_waits_and_is_told_of_at_the_end():
    output = Output(lambda tokens: bytes(tokens), [], [])
    assert [output.take(byte).text for byte in "é".encode()] == ["", "é"]
    output.take(0xE2)
    assert output.pending == b"\xe2"
    assert output.finish().text == "\ufffd"
    later = Output(lambda tokens: bytes(tokens), [], [], pending=b"\xe2\x82")
    assert later.take(0xAC).text == "€"
