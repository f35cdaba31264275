"""--tokenizer: the same words for every verb that turns a model's ids into text."""

from __future__ import annotations

import io
import json
import sys

import pytest
from random_model import random_model

from rwkv7 import ModelConfig
from rwkv7.cli import main
from rwkv7.weights import save_model

IDS = 300  # no known tokenizer's number


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = ModelConfig.from_sizes(vocab_size=IDS, width=16, layers=1, head_size=8)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(random_model(config).float(), path)
    return path


@pytest.fixture(params=["generate", "chat", "eval"])
def run(request, checkpoint, capfd, monkeypatch, tmp_path):
    """Run a verb with these options: (exit code, stdout, stderr)."""
    (tmp_path / "a.txt").write_text("In the beginning")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    given = {
        "generate": ["--prompt", "In", "--tokens", "40", "--seed", "1"],
        "chat": ["--tokens", "40", "--seed", "1"],
        "eval": [str(tmp_path / "a.txt")],
    }[request.param]

    def run(*options):
        with pytest.raises(SystemExit) as ended:
            main([request.param, str(checkpoint), *given, "--device", "cpu", *options])
        return ended.value.code or 0, *capfd.readouterr()

    return run


def test_bytes_for_a_model_with_more_ids(run):
    code, out, err = run("--tokenizer", "byte")
    assert code == 0, err
    assert out


def test_a_file(run, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    code, out, err = run("--tokenizer", str(tmp_path))
    assert code == 0, err
    assert out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ((), f"model: no tokenizer for its {IDS} tokens"),
        (("--tokenizer", "word"), "tokenizer: expected one of"),
        (("--tokenizer", "world"), f"expected at most the model's {IDS} tokens, found 65536"),
    ],
)
def test_mistakes_are_one_line(run, options, line):
    if "world" in options:
        pytest.importorskip("pyrwkv_tokenizer")
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert line in err.splitlines()[-1]


def test_what_is_measured_is_the_text_s_bytes(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("In the beginning é")
    arguments = [str(tmp_path / "a.txt"), "--tokenizer", "byte", "--json", str(tmp_path / "j")]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(checkpoint), *arguments, "--device", "cpu"])
    assert not ended.value.code
    (result,) = json.loads((tmp_path / "j").read_text())["results"]
    assert result["tokens"] == result["bytes"] == len("In the beginning é".encode())
