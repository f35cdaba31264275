"""The figures the demo's model is put beside."""

import math
import subprocess
from shutil import which

import pytest

from rwkv7 import baselines
from rwkv7.demo_text import load_text, split


def test_bigram_by_hand():
    # train "abab": counts ab 2, ba 1; p(a) = p(b) = 3/260. Held out "ab": p(a) then p(b | a).
    frequency = 3 / 260
    expected = -(math.log2(frequency) + math.log2((2 + frequency) / (2 + 1))) / 2
    assert baselines.bigram_bits_per_byte(b"abab", b"ab") == pytest.approx(expected, rel=1e-12)


def test_bigram_gives_every_next_byte_a_probability_and_they_sum_to_one():
    total = 0.0
    first = baselines.bigram_bits_per_byte(b"abcab", b"a")
    for byte in range(256):
        pair_bits = 2 * baselines.bigram_bits_per_byte(b"abcab", bytes([ord("a"), byte]))
        total += 2 ** (first - pair_bits)
    assert total == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_compressors_count_what_the_command_writes(tool):
    if which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    _, held_out = split(load_text())
    written = subprocess.run([tool, "-9"], input=held_out, capture_output=True, check=True).stdout
    ours = getattr(baselines, f"{tool}_bits_per_byte")(held_out)
    # Other builds of the same compressor may differ by a few bytes.
    assert ours == pytest.approx(8 * len(written) / len(held_out), rel=1e-3)


def test_on_the_shipped_text_each_baseline_beats_the_one_before():
    figures = baselines.bits_per_byte(*split(load_text()))
    assert list(figures) == ["byte bigram", "gzip -9", "xz -9"]
    assert 8 > figures["byte bigram"] > figures["gzip -9"] > figures["xz -9"] > 1


def test_bigram_learns_from_the_training_text():
    train, held_out = split(load_text())
    counted = baselines.bigram_bits_per_byte(train, held_out)
    assert counted < baselines.bigram_bits_per_byte(b"\x00", held_out) - 3


@pytest.mark.parametrize(("train", "held_out", "name"), [(b"", b"a", "train"), (b"a", b"", "held")])
def test_empty_texts_are_refused(train, held_out, name):
    with pytest.raises(ValueError, match=f"{name}.*at least one byte"):
        baselines.bits_per_byte(train, held_out)
