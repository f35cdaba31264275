"""`rwkv7 convert` and `rwkv7 inspect`, as a user meets them."""

import json

import pytest
import torch
from random_model import random_model
from safetensors.torch import save_file

from rwkv7 import load_model, save_model
from rwkv7.cli import main


@pytest.fixture
def rwkv7(capfd):
    """Run the command: (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_convert_and_inspect(rwkv7, tmp_path):
    model = random_model(dtype=torch.float32)
    save_model(model, tmp_path / "m.pth")
    code, out, _ = rwkv7("convert", tmp_path / "m.pth", tmp_path / "hf", "--dtype", "bf16")
    assert code == 0 and "3 layers, width 24" in out
    assert load_model(tmp_path / "hf").dtype == torch.bfloat16
    code, out, err = rwkv7("inspect", tmp_path / "hf")
    assert (code, err) == (0, "")
    assert "in flash-linear-attention's names" in out and "bfloat16" in out
    code, out, _ = rwkv7("inspect", tmp_path / "m.pth", "--json")
    assert code == 0 and json.loads(out)["facts"]["width"] == 24


def test_a_mistake_is_one_line(rwkv7, tmp_path):
    (tmp_path / "m.pth").write_bytes(b"nothing")
    code, out, err = rwkv7("convert", tmp_path / "m.pth", tmp_path / "n.pth")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    code, _, err = rwkv7("convert", tmp_path / "m.pth", tmp_path / "n.pth", "--dtype", "int8")
    assert code == 2 and "--dtype: expected one of fp64" in err
    code, out, err = rwkv7("inspect", tmp_path / "m.pth")
    assert code == 1 and "unreadable" in out
    assert err.startswith("error: cannot be read") and err.count("\n") == 1
    code, out, _ = rwkv7("inspect", tmp_path / "m.pth", "--json")
    assert code == 1 and json.loads(out)["problem"].startswith("cannot be read")
    code, _, err = rwkv7("inspect", tmp_path / "none")
    assert code == 2 and "there is no file or folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_a_file_cannot_write_on_the_terminal(rwkv7, tmp_path):
    save_file({"\x1b[31mred\n": torch.ones(1)}, tmp_path / "m.safetensors", {"a": "\x1b[2J"})
    code, out, err = rwkv7("inspect", tmp_path / "m.safetensors")
    assert code == 1 and "\x1b" not in out + err and err.count("\n") == 1
    code, _, err = rwkv7("convert", tmp_path / "m.safetensors", tmp_path / "n.pth")
    assert code == 2 and "\x1b" not in err and err.count("\n") == 1
