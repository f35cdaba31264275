"""Conversion: every way, bit for bit, whole or not at all."""

import errno
import itertools

import pytest
import torch
from random_model import SMALL, random_model
from safetensors.torch import load_file, save_file

import rwkv7.weights.save
from rwkv7 import load_model, save_model
from rwkv7.weights import convert
from rwkv7.weights.source import open_weights

FORMS = {"pth": "m.pth", "safetensors": "m.safetensors", "folder": "rwkv7-0.1b"}


def bits(path):
    """All tensors at `path` under official names: shapes less leading ones, dtypes and bytes."""
    with open_weights(path) as weights:
        return {
            name: (list(x.squeeze().shape), x.dtype, x.flatten().view(torch.uint8).tolist())
            for name, x in weights.items()
        }


@pytest.fixture
def mixed(tmp_path):
    """A file in bf16 with fp32 norms and a negative zero, its unused tensors not zero."""
    save_model(random_model(dtype=torch.bfloat16), tmp_path / "source.safetensors", {"step": "7"})
    tensors = load_file(tmp_path / "source.safetensors")
    for name, x in tensors.items():
        if "ln" in name:
            tensors[name] = x.float() + 1e-7
        if name.startswith("blocks.0.att.v") and not name.endswith("weight"):
            tensors[name] = torch.full_like(x, 3)
    tensors["blocks.1.att.w1"][0, 0] = -0.0
    save_file(tensors, tmp_path / "source.safetensors", {"step": "7"})
    return tmp_path / "source.safetensors"


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMS, FORMS)))
def test_there_and_back_bit_for_bit(tmp_path, mixed, first, second):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = tmp_path / "a" / FORMS[first], tmp_path / "b" / FORMS[second]
    assert convert(mixed, one) == SMALL
    assert convert(one, two) == SMALL
    expected, found = bits(mixed), bits(two)
    unused = {name for name in expected if name.startswith("blocks.0.att.v")} - {
        "blocks.0.att.value.weight"
    }
    assert len(unused) == 3
    if "folder" in (first, second):  # which has no place for what no model uses
        for content in (expected, found):
            for name in unused:
                content.pop(name, None)
    assert found == expected


def test_metadata_go_along(tmp_path, mixed):
    convert(mixed, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again.safetensors")
    with open_weights(tmp_path / "again.safetensors") as weights:
        assert weights.metadata == {"step": "7", "format": "pt"}


def test_the_official_files_are_what_save_model_writes(tmp_path):
    model = random_model(dtype=torch.float32)
    save_model(model, tmp_path / "m.safetensors")
    save_model(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again.safetensors")
    one, two = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "again.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(x, two[name]) for name, x in one.items())  # the shapes too


def test_another_dtype_is_one_rounding(tmp_path, mixed):
    convert(mixed, tmp_path / "m.pth", torch.float16)
    found = torch.load(tmp_path / "m.pth", weights_only=True)
    source = load_file(mixed)
    assert all(torch.equal(x, source[name].half()) for name, x in found.items())


def test_a_number_that_the_dtype_cannot_hold(tmp_path):
    model = random_model(dtype=torch.float32)
    with torch.no_grad():
        model.ln_out.bias[2] = 1e6
    save_model(model, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold the numbers of ln_out\.bias"):
        convert(tmp_path / "m.pth", tmp_path / "h.pth", torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


def test_tensors_that_share_memory_are_written_each(tmp_path):
    save_model(random_model(dtype=torch.float32), tmp_path / "m.pth")
    tensors = torch.load(tmp_path / "m.pth", weights_only=True)
    tensors["head.weight"] = tensors["emb.weight"]
    torch.save(tensors, tmp_path / "tied.pth")
    for name in ("a.safetensors", "a.pth", "hf"):
        convert(tmp_path / "tied.pth", tmp_path / name)
        model = load_model(tmp_path / name)
        assert torch.equal(model.head.weight, tensors["emb.weight"])
        assert model.head.weight.data_ptr() != model.emb.weight.data_ptr()


def test_refuses_to_write_over_a_folder(tmp_path, mixed):
    (tmp_path / "hf").mkdir()
    convert(mixed, tmp_path / "hf")  # an empty one will do
    with pytest.raises(FileExistsError, match="new or empty folder"):
        convert(mixed, tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        convert(mixed, tmp_path / "none" / "hf")
    with pytest.raises(ValueError, match=r"a folder's without a suffix, found m\.pht"):
        convert(mixed, tmp_path / "m.pht")


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_nothing(tmp_path, mixed, monkeypatch, form):
    def full(tensors, file, *_):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rwkv7.weights.save, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        convert(mixed, tmp_path / FORMS[form])
    assert list(tmp_path.iterdir()) == [mixed]
