"""Files of records: every good one is read, every bad one named, in memory for one of them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from rwkv7.tokenizer import get_tokenizer
from rwkv7.training.data import (
    BadRecords,
    build_corpus,
    find_text,
    open_corpus,
    prepare_data,
    records,
    text_digest,
)
from rwkv7.training.data.text import text_bytes, text_pieces

BYTE = get_tokenizer("byte")


def documents(path: Path, key: str = "text", bad: BadRecords | None = None) -> list[str]:
    found, held = [], b""
    for piece in text_pieces(find_text([path]), key=key, bad=bad):
        held += piece.text
        if piece.ends:
            found.append(held.decode())
            held = b""
    assert not held
    return found


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["in the\nbeginning", "wörld \u2028 \U0001f333", "", "x" * 3_000_000, "last"]
    lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)]
    lines[1] = json.dumps({"text": texts[1]}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())  # no newline at the end
    assert documents(path) == [text for text in texts if text]
    path.write_text('{"body": "b"}\n')
    assert documents(path, key="body") == ["b"]


BAD_LINES = {
    b'{"text": "cut off': "line 2: expected a JSON object: Unterminated .*, character 10",
    b"\x00\xff {": "line 2: expected UTF-8, found 0xff as byte 2",
    b"[1]": "line 2: expected a JSON object, found list",
    b'{"body": "x", "id": 3}': "line 2: expected the key 'text', found 'body', 'id'",
    b'{"text": null}': "line 2: 'text': expected text, found NoneType",
    b'{"text": ["a"]}': "line 2: 'text': expected text, found list",
    b'{"text": "caf\xe9"}': "line 2: expected UTF-8, found 0xe9 as byte 14",
    b'{"text": "\\ud800"}': "line 2: expected whole characters, found half of one",
    b"[" * 100_000: "line 2: expected a JSON object, found one nested too deeply",
    b'{"text": "' + b"x" * 300_000 + b'"}': "line 2: longer than 200000 bytes",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_stops_or_is_counted_named_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 200_000)
    monkeypatch.setattr(records, "PIECE", 1000)
    path, told = tmp_path / "a.jsonl", []
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n' + line)
    with pytest.raises(ValueError, match=f"a.jsonl: {BAD_LINES[line]}"):
        documents(path)
    bad = BadRecords("skip", told.append)
    assert documents(path, bad=bad) == ["one", "three"]
    assert bad.count == 2 and "a.jsonl: line 4: " in told[1]
    assert told == [f"left out: {name}" for name in bad.named]
    with pytest.raises(ValueError, match="on_bad: expected one of stop, skip, found 'go'"):
        BadRecords("go")


def test_names_of_bad_records_do_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x\n" * 500 + b'{"text": "y"}')
    told: list[str] = []
    bad = BadRecords("skip", told.append)
    assert documents(path, bad=bad) == ["y"]
    assert (bad.count, len(bad.named)) == (500, records.NAMED)
    assert len(told) == records.TOLD + 1 and "more, which are counted" in told[-1]


def test_tables_are_documents(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"Füße {n}\n" for n in range(600)] + [""]
    wanted = texts[:-1]
    for kind in (
        arrow.string(),
        arrow.large_string(),
        arrow.dictionary(arrow.int32(), arrow.string()),
    ):
        column = arrow.array(texts, arrow.string()).cast(kind)
        table = arrow.table({"id": arrow.array(range(len(texts))), "text": column})
        parquet.write_table(table, tmp_path / "t.parquet", row_group_size=250)
        with arrow.ipc.new_file(tmp_path / "f.arrow", table.schema) as file:
            file.write_table(table, 100)
        with arrow.ipc.new_stream(tmp_path / "s.arrow", table.schema) as stream:
            stream.write_table(table, 100)
        for name in ("t.parquet", "f.arrow", "s.arrow"):
            assert documents(tmp_path / name) == wanted, (name, kind)
    with pytest.raises(ValueError, match="expected the column 'body', found 'id', 'text'"):
        documents(tmp_path / "t.parquet", key="body")
    for name in ("t.parquet", "f.arrow", "s.arrow"):
        bad = BadRecords("skip")
        assert documents(tmp_path / name, key="id", bad=bad) == []
        assert "expected a column of text, found int64" in bad.named[0]


def test_bad_rows_and_damaged_tables(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = arrow.array([b"good", None, b"caf\xe9", b"also good"], arrow.binary())
    table = arrow.table({"text": raw.view(arrow.string())})
    paths = [tmp_path / "t.parquet", tmp_path / "s.arrow"]
    parquet.write_table(table, paths[0])
    with arrow.ipc.new_stream(paths[1], table.schema) as stream:
        stream.write_table(table)
    for path in paths:
        bad = BadRecords("skip")
        assert documents(path, bad=bad) == ["good", "also good"]
        assert [name.partition(": ")[2][:6] for name in bad.named] == ["row 1:", "row 2:"]
        with pytest.raises(ValueError, match="row 1: 'text': expected text, found nothing"):
            documents(path)
        for size in (3, 40, path.stat().st_size * 2 // 3):
            cut = tmp_path / f"cut{path.suffix}"
            cut.write_bytes(path.read_bytes()[:size])
            bad = BadRecords("skip")
            documents(cut, bad=bad)
            assert bad.count == 1 and "cut" in bad.named[0]
            with pytest.raises(ValueError, match="cut"):
                documents(cut)


def test_rows_are_counted_through_the_whole_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [None if n in (0, 300, 599) else "x" for n in range(600)]
    table = arrow.table({"text": rows})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=290)
    with arrow.ipc.new_stream(tmp_path / "s.arrow", table.schema) as stream:
        stream.write_table(table, 100)
    for name in ("t.parquet", "s.arrow"):
        bad = BadRecords("skip")
        assert len(documents(tmp_path / name, bad=bad)) == 597
        assert [name.split(": ")[1] for name in bad.named] == ["row 0", "row 300", "row 599"]


def test_a_damaged_row_group_costs_only_itself(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    texts = [f"{n} " * 50 for n in range(40)]
    parquet.write_table(arrow.table({"text": texts}), path, row_group_size=10, use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    content[place : place + 200] = b"\xff" * 200
    path.write_bytes(content)
    bad = BadRecords("skip")
    assert documents(path, bad=bad) == texts[:10] + texts[20:]
    assert bad.count == 10 and "row group 1, from row 10 (10 records): " in bad.named[0]


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r'a.parquet: .*pip install "rwkv7\[data\]"'):
        documents(tmp_path / "a.parquet")


def test_text_and_records_are_built_into_one_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a plain text\nof two lines")
    (folder / "b.jsonl").write_text('{"text": "b1"}\nbroken\n{"text": "b2"}\n')
    (folder / "c.bin").write_bytes(b"\0")
    text, bad, read = find_text([folder]), BadRecords("skip"), []
    assert text.skipped == 1
    made = build_corpus(text, tmp_path / "c", BYTE, bad=bad, on_read=read.append)
    corpus = open_corpus(tmp_path / "c")
    found = [bytes(corpus.document(n).tolist()).decode() for n in range(len(corpus))]
    assert found == ["a plain text\nof two lines", "b1", "b2"]
    assert (made.documents, made.tokens, bad.count) == (3, 29, 1)
    assert read == sorted(read) and read[-1] <= text.size
    with pytest.raises(ValueError, match="b.jsonl: line 2: .*--on-bad skip"):
        build_corpus(text, tmp_path / "d", BYTE)
    (folder / "a.txt").unlink()
    with pytest.raises(
        ValueError, match="at least one document .*; 3 bad records, the first: .*'x'"
    ):
        build_corpus(find_text([folder]), tmp_path / "d", BYTE, key="x", bad=BadRecords("skip"))
    with pytest.raises(ValueError, match="expected text to tokenize, found the corpus"):
        build_corpus(find_text([tmp_path / "c"]), tmp_path / "d", BYTE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "in"]


def test_world_tokens_end_each_record(tmp_path: Path) -> None:
    world = get_tokenizer("world")
    (tmp_path / "a.jsonl").write_text('{"text": "b1"}\n{"text": ""}\n{"text": "Füße"}\n')
    build_corpus(find_text([tmp_path / "a.jsonl"]), tmp_path / "c", world)
    corpus = open_corpus(tmp_path / "c")
    wanted = [[*world.encode(text), 0] for text in ("b1", "Füße")]
    assert [corpus.document(n).tolist() for n in range(len(corpus))] == wanted


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "%s"}\n' % (b"word " * 400) * lines)
        tracemalloc.start()
        build_corpus(find_text([path]), tmp_path / "c", BYTE)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(800) < 1.2 * peak(50) < 1 << 21


def test_a_run_reads_records_and_holds_out_the_last_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(10)))
    text = find_text([path])
    assert text_bytes(text) == 60
    data = prepare_data(text, tmp_path / "data", BYTE, 9)
    assert data.held_out.tobytes() == b"t 8text 9" and len(data.train) == 51
    found = [data.documents.document(n).tobytes() for n in range(len(data.documents))]
    assert found == [*(b"text %d" % n for n in range(8)), b"tex"]
    assert data.info.sha256 == text_digest(text)
    path.write_text('{"text": ""}')
    with pytest.raises(
        ValueError, match="at least one document with text, found none in .*a.jsonl"
    ):
        prepare_data(find_text([path]), tmp_path / "data", BYTE, 9)
