"""Files that are damaged, lie about their sizes or want code run: refused in one clear line."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from random_model import random_model
from safetensors.torch import load_file, save_file

from rwkv7 import load_model, save_model
from rwkv7.files import open_tensors


@pytest.fixture
def good(tmp_path):
    save_model(random_model(dtype=torch.float32), tmp_path / "good.pth")
    save_model(random_model(dtype=torch.float32), tmp_path / "good.safetensors")
    return tmp_path


def refused(path, says):
    with pytest.raises(ValueError, match=says) as met:
        load_model(path)
    text = str(met.value)
    assert str(path) in text and "\n" not in text and len(text) < 500 + len(str(path))


class Trap:
    """Pickled, it asks for a folder to be made when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_code_in_a_file_is_not_run(good):
    canary = good / "sprung"
    tensors = torch.load(good / "good.pth", weights_only=True)
    files = {
        "zip.pth": lambda file: torch.save({**tensors, "extra": Trap(canary)}, file),
        "old.pth": lambda file: torch.save(
            {"extra": Trap(canary)}, file, _use_new_zipfile_serialization=False
        ),
        "plain.pth": lambda file: file.write_bytes(pickle.dumps(Trap(canary), protocol=2)),
    }
    for name, write in files.items():
        write(good / name)
        refused(good / name, rf"{name}: cannot be read as a PyTorch file .*asks for \w+\.mkdir")
    hf = good / "hf"
    hf.mkdir()
    (good / "zip.pth").rename(hf / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(hf)
    assert not canary.exists()
    pickle.loads((good / "plain.pth").read_bytes())  # the trap itself works
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_anywhere(good, suffix):
    whole = (good / f"good{suffix}").read_bytes()
    path = good / f"cut{suffix}"
    for length in (0, 1, 7, 8, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read .*truncated")


def test_a_renamed_file_is_read_as_what_it_is_or_named(good):
    expected = load_model(good / "good.pth")
    for name in ("good", "other.pth", "good.v2"):
        (good / name).write_bytes((good / "good.safetensors").read_bytes())
        found = load_model(good / name)
        pairs = zip(found.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    (good / "good.pth").rename(good / "a.safetensors")
    refused(good / "a.safetensors", r"it is a PyTorch file under another name; rename it to \.pth")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content", [b"hello" * 1000, pickle.dumps({"a": 1}, protocol=4)])
def test_what_torch_did_not_write_is_told_in_words(good, content):
    (good / "text.pth").write_bytes(content)
    refused(good / "text.pth", "it is no file that torch.save wrote; nothing was run")


def header(path, entries, data=b""):
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors_that_claim_more_than_they_hold(good):
    path = good / "huge.safetensors"
    huge = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header(path, {"emb.weight": huge}, bytes(64))
    refused(path, "cannot be read")
    small = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 64]}
    header(path, {"emb.weight": small}, bytes(64))
    refused(path, "cannot be read")
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(path, "cannot be read")


def test_pytorch_files_that_claim_more_than_they_hold(good):
    one = torch.zeros(1)
    torch.save({"emb.weight": one.expand(10**6, 10**6)}, good / "stretched.pth")
    refused(good / "stretched.pth", r"emb\.weight claims 4,000,000,000,000 bytes")
    much = torch.zeros(1000)
    torch.save({f"blocks.{i}.x": much for i in range(100)}, good / "shared.pth")
    refused(good / "shared.pth", "claim more memory than twice the file")

    with (
        zipfile.ZipFile(good / "good.pth") as source,
        zipfile.ZipFile(good / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
    refused(good / "bomb.pth", "it is compressed")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_that_are_none(good, bad, dtype):
    tensors = load_file(good / "good.safetensors")
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["blocks.1.ffn.key.weight"][3, 5] = bad
    save_file(tensors, good / "bad.safetensors")
    refused(good / "bad.safetensors", r"blocks\.1\.ffn\.key\.weight: expected finite numbers")


def test_a_tensor_without_numbers_is_named(good):
    tensors = torch.load(good / "good.pth", weights_only=True)
    tensors["head.weight"] = tensors["head.weight"].to("meta")
    torch.save(tensors, good / "meta.pth")
    refused(good / "meta.pth", r"head\.weight has a shape and no numbers: .* meta device")


def test_nested_dictionaries_are_named(good):
    tensors = torch.load(good / "good.pth", weights_only=True)
    torch.save({"epoch": 3, "state_dict": tensors}, good / "trainer.ckpt")
    refused(good / "trainer.ckpt", "found one with the keys epoch, state_dict")


def test_a_file_that_changes_while_it_is_read(good):
    with open_tensors(good / "good.pth") as tensors:
        assert len(tensors["ln_out.weight"]) == 24
        tensors.release()
        kept = tensors["ln_out.weight"]
        copy = kept.clone()
        tensors.release()
        assert torch.equal(kept, copy)  # what is still held stays
        (good / "good.safetensors").rename(good / "good.pth")
        with pytest.raises(ValueError, match=r"good\.pth: changed while it was read"):
            tensors.release()


def test_the_same_tensor_in_two_shards(good):
    hf = good / "hf"
    save_model(load_model(good / "good.pth"), hf)
    (hf / "model.safetensors").rename(hf / "a.safetensors")
    (hf / "b.safetensors").write_bytes((hf / "a.safetensors").read_bytes())
    listing = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(listing))
    refused(hf, r"is in a\.safetensors and b\.safetensors")


def test_the_folder_of_a_run_that_tuned_adapters_says_where_its_model_is(tmp_path):
    (tmp_path / "merged.safetensors").touch()
    with pytest.raises(ValueError, match=r"tuned adapters; its model is .*merged\.safetensors"):
        load_model(tmp_path)
