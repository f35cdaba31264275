"""tokenizer.json files: the bytes of every id, nothing made of text that spells a special token."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7.tokenizer import StreamDecoder, get_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXT = "In the beginning, wörld 🌍 — 起初\n\n\tx  = 1\0"


def byte_level(folder):
    """A small byte-level file: a special end, and an added token that is plain text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    made.add_tokens(["  "])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def byte_fallback(folder):
    """A small file in SentencePiece's way."""
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "\u2581a",
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    made.save(str(folder / "sentence.json"))
    return folder / "sentence.json"


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request, tmp_path_factory):
    return get_tokenizer(str(request.param(tmp_path_factory.mktemp("files"))))


def test_text_and_stray_bytes_come_back(tokenizer):
    for text in (TEXT.encode(), b"", b"\xff", b"ab\xe8\xb5cd\x80\x80", bytes(range(256))):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert get_tokenizer(tokenizer.name).encode(TEXT) == tokenizer.encode(TEXT)


@given(data=st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_bytes_come_back(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_text_that_spells_a_special_token_is_text(tokenizer):
    end = tokenizer.end_of_document
    assert end is not None and tokenizer.decode_bytes([end]) == b""
    for text in (b"a<|endoftext|>b", b"a</s>b"):
        ids = tokenizer.encode(text)
        assert end not in ids and tokenizer.decode_bytes(ids) == text


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"found {wrong}"):
            tokenizer.decode_bytes([wrong])


def test_streamed_text_is_whole_characters(tokenizer):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(i) for i in tokenizer.encode(TEXT)]
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)


def test_its_ids_are_the_package_s(tmp_path):
    path = byte_level(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(path))
    assert get_tokenizer(str(tmp_path)).encode(TEXT) == made.encode(TEXT).ids  # the folder too


def test_the_end_that_the_folder_names(tmp_path):
    path = byte_level(tmp_path)
    ours = get_tokenizer(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "  "}}')
    assert (
        get_tokenizer(str(path)).decode_bytes([get_tokenizer(str(path)).end_of_document]) == b"  "
    )
    assert ours.decode_bytes([ours.end_of_document]) == b""
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        get_tokenizer(str(path))


def test_files_that_will_not_do(tmp_path, monkeypatch):
    path = byte_level(tmp_path)
    content = json.loads(path.read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ByteLevel or has ByteFallback, found WordPiece"):
        get_tokenizer(str(path))
    for text in ("", "{}", "[1]", '{"model": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
            get_tokenizer(str(path))
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"rwkv7\[tokenizers\]"):
        get_tokenizer(str(path))
