"""The shipped text is the one its note describes, and is cut where it says."""

import hashlib
import re
from importlib import resources

import pytest

from rwkv7.demo_text import HELD_OUT_BYTES, load_text, split


def test_the_text_is_the_one_described_beside_it():
    text = load_text()
    note = resources.files("rwkv7").joinpath("data/README.md").read_text(encoding="utf-8")
    assert f"`{hashlib.sha256(text).hexdigest()}`" in note
    assert f"{len(text):,} bytes" in note


def test_the_text_is_readable_lines_of_ascii():
    text = load_text()
    assert re.fullmatch(rb"[\n\x20-\x7e]*", text)
    chapters = text.decode("ascii").split("\n\n")
    assert len(chapters) == 1189
    assert sum(len(chapter.strip().split("\n")) - 1 for chapter in chapters) == 31102
    assert text.startswith(b"Genesis 1\n1 In the beginning God created")


def test_split_holds_out_the_last_256_kib_and_loses_nothing():
    text = load_text()
    train, held_out = split(text)
    assert len(held_out) == HELD_OUT_BYTES == 256 * 1024
    assert train + held_out == text


@pytest.mark.parametrize("held_out", [0, -1, 4, 5])
def test_split_that_leaves_nothing_is_refused(held_out):
    with pytest.raises(ValueError, match=f"held_out: expected 1 to 3.*found {held_out}"):
        split(b"four", held_out)
