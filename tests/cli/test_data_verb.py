"""`rwkv7 data`: what it builds, what it shows, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv7.cli import main
from rwkv7.training.data import open_corpus


def call(*arguments: object) -> int | None:
    with pytest.raises(SystemExit) as ended:
        main(["data", *map(str, arguments)])
    return ended.value.code


def test_build_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"body": "in the \\u001b[31mbeginning"}\n' + "bad\n" * 30 + '{"body": "was"}'
    )
    prefix = tmp_path / "c"
    assert call("build", tmp_path / "a.jsonl", "--out", prefix, "--key", "body") == 2
    assert "a.jsonl: line 2: " in capsys.readouterr().err
    assert not list(tmp_path.glob("c*"))
    skip = ("--key", "body", "--on-bad", "skip")
    assert call("build", tmp_path / "a.jsonl", "--out", prefix, *skip) == 0
    out, err = capsys.readouterr()
    assert "2 documents, 24 byte tokens" in out
    assert err.count("left out: ") == 22 and "line 21: " in err and "line 22: " not in err
    assert "left out: 30 records" in err
    assert len(open_corpus(prefix)) == 2
    assert call("show", f"{prefix}.idx") == 0
    out = capsys.readouterr().out
    assert "documents  2" in out and "24, uint8" in out and "in the \ufffd[31mbeginning" in out
    assert call("show", prefix, "--document", 1, "--tokenizer", "world") == 0
    assert "119 97 115" in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, prefix = tmp_path / "a.txt", tmp_path / "c"
    text.write_text("in the beginning")
    assert call("build", text, "--out", prefix) == 0
    capsys.readouterr()
    for arguments, message in (
        (("build", text, "--out", prefix), "c.bin exists; remove it"),
        (("build", text, "--out", tmp_path / "c.bin"), "without the suffix .bin"),
        (("build", text, "--out", tmp_path / "no" / "c"), "does not exist; make it first"),
        (("build", tmp_path / "no.txt", "--out", tmp_path / "d"), "no file or folder"),
        (("build", prefix, "--out", tmp_path / "d"), "found the corpus"),
        (("build", text, "--out", tmp_path / "d", "--on-bad", "go"), "on_bad: expected"),
        (("build", text, "--out", tmp_path / "d", "--tokenizer", "go"), "tokenizer: expected one"),
        (("show", tmp_path / "d"), "there is no pair"),
        (("show", prefix, "--document", 1), "document: expected 0 to 0, found 1"),
    ):
        assert call(*arguments) == 2, arguments
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    (tmp_path / "c.idx").write_bytes(b"no index")
    assert call("show", prefix) == 2 and "MMIDIDX" in capsys.readouterr().err
