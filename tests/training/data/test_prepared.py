"""Text becomes token files that hold every byte of it, and unusable text is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from rwkv7.tokenizer import get_tokenizer
from rwkv7.training.data import find_text, open_data, prepare_data, text_digest
from rwkv7.training.data import text as text_module

BYTE = get_tokenizer("byte")


def test_folders_are_read_sorted_without_hidden_binary_and_own_files(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"b",
        "a/z.md": b"az",
        "a/c.txt": b"ac",
        ".git/x": b"hidden",
        "image.png": b"\x89PNG\0",
        "latin.txt": b"caf\xe9",
        "run/log.jsonl": b"ours",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = find_text([tmp_path], exclude=tmp_path / "run")
    names = [p.relative_to(tmp_path).as_posix() for p in found.files]
    assert names == ["a/c.txt", "a/z.md", "b.txt", "latin.txt"]
    assert (found.size, found.skipped) == (9, 1)
    # A file named outright is taken as it is, and the order given is kept.
    named = find_text([tmp_path / "image.png", tmp_path / "b.txt"])
    assert [p.name for p in named.files] == ["image.png", "b.txt"]


def test_unusable_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binaries"
    empty.touch()
    binary.mkdir()
    (binary / "x.bin").write_bytes(b"\0")
    for paths, message in (
        ([], "at least one file"),
        ([empty], "0 bytes"),
        ([binary], "1 binary files only"),
        ([tmp_path / "none.txt"], "no file or folder .*none.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            find_text(paths)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*empty.txt: Permission denied"):
        find_text([empty])


@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_bytes_are_split_exactly_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(text_module, "PIECE", piece)
    (tmp_path / "1.txt").write_bytes(b"in the\nbeginning \xff\n\n was")
    (tmp_path / "2.txt").write_bytes("wörld\n".encode())
    text = find_text([tmp_path / "1.txt", tmp_path / "2.txt"])
    everything = b"".join(p.read_bytes() for p in text.files)
    for held_out in (0, 1, 6, 9, len(everything) - 1):
        tokens = prepare_data(text, tmp_path / "data", BYTE, held_out)
        assert tokens.train.tobytes() + tokens.held_out.tobytes() == everything
        assert len(tokens.held_out) == held_out == tokens.info.held_out_bytes
        assert tokens.info.train_bytes == len(everything) - held_out
        assert tokens.info.sha256 == hashlib.sha256(everything).hexdigest() == text_digest(text)


def test_default_share_and_a_file_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 95)
    (tmp_path / "b.txt").write_bytes(b"y" * 7)
    text, other = find_text([tmp_path / "a.txt"]), find_text([tmp_path / "b.txt"])
    tenth = prepare_data(text, tmp_path / "data", BYTE)
    assert (len(tenth.train), len(tenth.held_out)) == (86, 9)
    apart = prepare_data(text, tmp_path / "data", BYTE, None, other)
    assert (len(apart.train), apart.held_out.tobytes()) == (95, b"y" * 7)
    assert apart.info.sha256 == text_digest(text, other)
    with pytest.raises(ValueError, match=r"held_out: .* \(95\), found 95"):
        prepare_data(text, tmp_path / "data", BYTE, 95)


def test_world_tokens_end_each_document(tmp_path: Path) -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = get_tokenizer("world")
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_bytes(f"Füße {name}\n".encode() * 20 + b"\xff")
    tokens = prepare_data(find_text([tmp_path]), tmp_path / "data", world, 101)
    assert tokens.train.dtype == np.dtype("<u2")
    stream = [*tokens.train.tolist(), *tokens.held_out.tolist()]
    assert stream.count(0) == 2 and stream[-1] == 0
    assert world.decode_bytes(stream) == b"".join(
        (tmp_path / name).read_bytes() for name in ("1.txt", "2.txt")
    )
    assert len(world.decode_bytes(tokens.held_out.tolist())) == 101


def test_token_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 95)
    folder = tmp_path / "data"
    with pytest.raises(ValueError, match="tokens of the run are missing"):
        open_data(folder)
    prepare_data(find_text([tmp_path / "a.txt"]), folder, BYTE)
    with (folder / "train.bin").open("rb+") as file:
        file.truncate(50)
    with pytest.raises(ValueError, match="damaged: .*train.bin: expected 86 bytes, .*, found 50"):
        open_data(folder)
