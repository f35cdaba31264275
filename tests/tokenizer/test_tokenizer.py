"""Tokenizers give back every byte, and a stream of ids gives whole characters only."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7.tokenizer import (
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    WorldTokenizer,
    get_tokenizer,
    tokenizer_of,
)

TEXT = "In the beginning, wörld 🌍 — 起初\n\n\tx = 1\0"


@pytest.fixture(scope="module", params=["byte", "world"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "world":
        pytest.importorskip("pyrwkv_tokenizer")
    return get_tokenizer(request.param)


def test_text_and_stray_bytes_come_back(tokenizer: Tokenizer) -> None:
    for text in (TEXT.encode(), b"", b"\xff", b"ab\xe8\xb5cd\x80\x80", bytes(range(256))):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode(TEXT) == tokenizer.encode(TEXT.encode())
    # What the shell hands over as an argument that is not UTF-8.
    assert tokenizer.decode_bytes(tokenizer.encode("a\udcffb")) == b"a\xffb"


@given(st.binary(max_size=60))
@settings(max_examples=50, deadline=None)
def test_any_bytes_come_back(data: bytes) -> None:
    byte = ByteTokenizer()
    assert byte.decode_bytes(byte.encode(data)) == data


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"found {wrong}"):
            tokenizer.decode_bytes([65, wrong])


def test_world_is_the_longest_match_over_the_published_vocabulary() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = WorldTokenizer()
    assert world.encode("\n") == [11]
    assert world.decode_bytes([world.end_of_document or 0, 65533]) == b""
    known = {token: i for i, token in enumerate(world._table) if token}
    data, ids, position = TEXT.encode() * 3, [], 0
    while position < len(data):
        length = next(n for n in range(128, 0, -1) if data[position : position + n] in known)
        ids.append(known[data[position : position + length]])
        position += length
    assert world.encode(data) == ids


def test_world_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    with pytest.raises(ValueError, match=r"rwkv7\[world\]"):
        get_tokenizer("world")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match='"byte", "world", or the path of .*, found \'words\''):
        get_tokenizer("words")


def test_stream_gives_whole_characters_only(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(i) for i in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert decoder.pending == b"" and decoder.flush() == ""


def test_stream_cut_inside_a_character_goes_on_in_another_decoder() -> None:
    byte = ByteTokenizer()
    ids = byte.encode(TEXT)
    for cut in range(len(ids)):
        first = StreamDecoder(byte)
        text = "".join(map(first.feed, ids[:cut]))
        second = StreamDecoder(byte, pending=first.pending)
        assert text + "".join(map(second.feed, ids[cut:])) == TEXT


def test_stream_shows_stray_and_unfinished_bytes() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.feed(0xFF) == "\ufffd"
    assert decoder.feed(0xE8) == "" and decoder.pending == b"\xe8"
    assert decoder.flush() == "\ufffd" and decoder.pending == b""
    assert decoder.feed(65) == "A"


CHARACTERS = st.text(max_size=12) | st.sampled_from(["🌍👩‍🚀", "起初", "é" * 3, "\u0301a"])


@given(CHARACTERS, st.lists(st.integers(0, 60)))
@settings(max_examples=100, deadline=None)
def test_whole_characters_however_the_bytes_are_cut(text: str, cuts: list[int]) -> None:
    """Every piece is valid on its own, whatever the pieces that the bytes come in."""
    data = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
    expected = data.decode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]

    class Pieces(ByteTokenizer):
        vocab_size = max(len(pieces), 1)

        def decode_bytes(self, ids):  # type: ignore[no-untyped-def]
            return b"".join(pieces[i] for i in ids)

    decoder, shown = StreamDecoder(Pieces()), ""
    for number in range(len(pieces)):
        new = decoder.feed(number)
        shown += new
        assert expected.startswith(shown)
        assert len(decoder.pending) <= 3
    assert shown == expected and decoder.flush() == ""


def test_a_model_with_more_ids_than_its_tokenizer() -> None:
    wide = tokenizer_of(260, "byte")
    assert (wide.name, wide.vocab_size, wide.end_of_document) == ("byte", 260, None)
    assert wide.encode("aé") == ByteTokenizer().encode("aé")
    assert wide.decode_bytes([97, 256, 259, 98]) == b"ab"
    with pytest.raises(ValueError, match="ids 0 to 259, found 260"):
        wide.decode_bytes([260])
    assert isinstance(tokenizer_of(256, "byte"), ByteTokenizer)
    with pytest.raises(ValueError, match="at most the model's 255 tokens, found 256"):
        tokenizer_of(255, "byte")
