"""PREFIX.bin and PREFIX.idx: what others wrote is read, what is written others read, lies fail."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7.training.data import Corpus, binidx, corpus_prefix, open_corpus, write_corpus

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]


def index_of(sizes: list[int], itemsize: int = 2, code: int = 8, firsts: object = None) -> bytes:
    """PREFIX.idx as the format's description has it, written number by number."""
    documents = range(len(sizes) + 1) if firsts is None else firsts
    places = [itemsize * end for end in itertools.accumulate([0, *sizes])][:-1]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sizes), len(documents))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *places)
        + struct.pack(f"<{len(documents)}q", *documents)
    )


def pair(folder: Path, index: bytes, tokens: bytes) -> Path:
    (folder / "c.idx").write_bytes(index)
    (folder / "c.bin").write_bytes(tokens)
    return folder / "c"


def whole(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(number).tolist() for number in range(len(corpus))]


def test_a_foreign_corpus_is_read(tmp_path: Path) -> None:
    ids = list(range(5, 13))
    tokens = struct.pack("<8H", *ids)
    corpus = open_corpus(pair(tmp_path, index_of([3, 0, 1, 4]), tokens))
    assert whole(corpus) == DOCUMENTS and corpus.tokens.dtype == np.dtype("<u2")
    # Documents of several sequences, and sequences of none: only the documents' borders count.
    corpus = open_corpus(pair(tmp_path, index_of([3, 0, 1, 4], firsts=[0, 2, 2, 4]), tokens))
    assert whole(corpus) == [[5, 6, 7], [], [8, 9, 10, 11, 12]]
    assert corpus.lengths().tolist() == [3, 0, 5]
    for code, letter in {1: "B", 2: "b", 3: "h", 4: "i", 5: "q"}.items():
        tokens = struct.pack(f"<8{letter}", *ids)
        corpus = open_corpus(pair(tmp_path, index_of([8], len(tokens) // 8, code), tokens))
        assert whole(corpus) == [ids]
    assert whole(open_corpus(pair(tmp_path, index_of([]), b""))) == []


@pytest.mark.parametrize("piece", [2, 1 << 16])
def test_what_is_written_is_the_format_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(binidx, "PIECE", piece)
    # Documents in several pieces, empty ones left out, and a last one that nobody ended.
    pieces = [
        ([5, 6], False),
        ([7], True),
        ([], True),
        ([8], True),
        ([9], False),
        ([10, 11, 12], False),
    ]
    made = write_corpus(
        tmp_path / "c", ((np.array(ids, np.int64), ends) for ids, ends in pieces), np.dtype("<u2")
    )
    assert (made.documents, made.tokens) == (3, 8)
    assert (tmp_path / "c.idx").read_bytes() == index_of([3, 1, 4])
    assert (tmp_path / "c.bin").read_bytes() == struct.pack("<8H", *range(5, 13))
    assert whole(open_corpus(tmp_path / "c")) == [ids for ids in DOCUMENTS if ids]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_a_document_longer_than_a_sequence_can_be_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binidx, "LONGEST", 3)
    documents = [list(range(n)) for n in (3, 7, 1, 6, 10)]
    pieces = ((np.array([x]), x == ids[-1]) for ids in documents for x in ids)
    assert write_corpus(tmp_path / "c", pieces, np.dtype("u1")).documents == 5
    assert whole(open_corpus(tmp_path / "c")) == documents
    index = (tmp_path / "c.idx").read_bytes()
    assert index == index_of([3, 3, 3, 1, 1, 3, 3, 3, 3, 3, 1], 1, 1, [0, 1, 4, 5, 7, 11])


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (b"", b"", "expected a Megatron index"),
        (b"RWKV" * 20, b"", "expected a Megatron index"),
        (index_of([2])[:-1], b"abcd", "truncated or damaged"),
        (index_of([2]) + b"x", b"abcd", "truncated or damaged"),
        (index_of([2], firsts=[]), b"abcd", "document offsets .1 at least"),
        (index_of([2], code=7), b"abcd", "integer tokens, found version 1 and type 7"),
        (index_of([2], code=99), b"abcd", "type 99"),
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 2, 8, 0, 1) + b"\0" * 8, b"", "found version 2"),
        # Counts that would need exabytes must not be believed.
        (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2**62, 2**62), b"", "truncated or damaged"),
        (index_of([2]), b"abc", "expected 4 bytes, .* found 3"),
        (index_of([2]), b"abcdef", "expected 4 bytes, .* found 6"),
        (index_of([3, -1]), b"abcd", "sequence 1: .* found -1 tokens"),
        (index_of([1, 1], itemsize=4), b"abcd", "sequence 1: expected it at byte 2"),
        (index_of([1, 1], firsts=[0, 1]), b"abcd", "end with sequence 2, found 1"),
        (index_of([1, 1], firsts=[1, 2]), b"abcd", "rise from 0 to 2"),
        (index_of([1, 1], firsts=[0, 2, 1, 2]), b"abcd", "rise from 0 to 2"),
        (index_of([1, 1], firsts=[0, 3, 2]), b"abcd", "rise from 0 to 2"),
        (index_of([1, 1], firsts=[0, -1, 2]), b"abcd", "rise from 0 to 2"),
    ],
)
def test_files_that_are_not_whole_or_lie_are_refused(
    tmp_path: Path, index: bytes, tokens: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_corpus(pair(tmp_path, index, tokens))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_index_never_leads_outside_the_tokens(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    index = bytearray(index_of([3, 0, 1, 4], firsts=[0, 2, 4]))
    for _ in range(data.draw(st.integers(1, 3))):
        index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
    try:
        corpus = open_corpus(pair(folder, bytes(index), struct.pack("<8H", *range(8))))
    except ValueError:
        return
    assert list(itertools.chain(*whole(corpus))) == corpus.tokens.tolist()


def test_a_failed_writing_leaves_the_old_pair(tmp_path: Path) -> None:
    prefix = pair(tmp_path, index_of([2]), b"abcd")

    def interrupted(error: BaseException) -> object:
        yield np.array([1, 2, 3]), True
        raise error

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write_corpus(prefix, interrupted(error), np.dtype("u1"))
        assert open_corpus(prefix).tokens.tobytes() == b"abcd"
    with pytest.raises(ValueError, match="fit in uint8, found 256"):
        write_corpus(prefix, [(np.array([1, 256]), True)], np.dtype("u1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_a_kill_between_the_two_files_leaves_no_pair_that_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, real = pair(tmp_path, index_of([2]), b"abcd"), Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        write_corpus(prefix, [(np.array([1, 2]), True)], np.dtype("<u2"))
    assert corpus_prefix(prefix) is None


def test_the_names_of_a_pair(tmp_path: Path) -> None:
    prefix = pair(tmp_path, index_of([2]), b"abcd")
    for name in ("c", "c.bin", "c.idx"):
        assert corpus_prefix(tmp_path / name) == prefix
    assert corpus_prefix(tmp_path / "d") is None and corpus_prefix(tmp_path / "d.bin") is None


def test_the_start_of_a_corpus_and_its_ids(tmp_path: Path) -> None:
    corpus = open_corpus(pair(tmp_path, index_of([3, 0, 1, 4]), struct.pack("<8H", *range(5, 13))))
    assert whole(corpus.first(5)) == [[5, 6, 7], [], [8], [9]]
    assert whole(corpus.first(3)) == [[5, 6, 7]] and whole(corpus.first(0)) == []
    assert corpus.starts[-1] == 8 and corpus.starts[1:3] == [3, 3]
    with pytest.raises(IndexError):
        corpus.starts[5]
    assert corpus.starts_between(1, 4) == [3, 4] and corpus.starts_between(5, 7) == []
    corpus.check_ids(13, "c")
    with pytest.raises(ValueError, match="c: expected ids from 0 to 11, found 12 at token 7"):
        corpus.check_ids(12, "c")
    negative = Corpus.of(np.array([1, -1], np.int32), [0])
    with pytest.raises(ValueError, match="found -1 at token 1"):
        negative.check_ids(12, "c")
