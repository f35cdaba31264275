"""Checkpoints in official names: read, written, and refused in which words."""

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_model import SMALL, random_model, random_tokens
from safetensors.torch import load_file, save_file

from rwkv7 import RWKV7, ModelConfig, load_model, save_model
from rwkv7.weights import config_from_tensors

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loading.py"
ONE_LAYER = ModelConfig.from_dict({**SMALL.to_dict(), "layers": 1, "value_rank": 32})


def assert_same_model(model, expected):
    assert model.config == expected.config
    for (name, x), (other, y) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(x, y), name
        assert x.requires_grad and x.is_contiguous()


@pytest.fixture
def tensors(tmp_path):
    """What a file of the small model holds."""
    save_model(random_model(dtype=torch.float32), tmp_path / "source.pth")
    return torch.load(tmp_path / "source.pth", weights_only=True)


def refused(content, path, says):
    torch.save(content, path)
    with pytest.raises(ValueError, match=says):
        load_model(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [SMALL, ONE_LAYER], ids=["three", "one"])
def test_there_and_back(tmp_path, suffix, dtype, config):
    model = random_model(config, dtype)
    save_model(model, tmp_path / f"m{suffix}")
    assert_same_model(load_model(tmp_path / f"m{suffix}"), model)
    assert load_model(tmp_path / f"m{suffix}", dtype=torch.float64).dtype == torch.float64


def test_official_names_and_shapes(tensors):
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    C, H, N = 24, 3, 8
    expected = {
        "emb.weight": [29, C],
        "head.weight": [29, C],
        "ln_out.weight": [C],
        "ln_out.bias": [C],
        "blocks.0.ln0.weight": [C],
        "blocks.0.ln0.bias": [C],
    }
    for i in range(3):
        for norm in ("ln1", "ln2", "att.ln_x"):
            expected[f"blocks.{i}.{norm}.weight"] = expected[f"blocks.{i}.{norm}.bias"] = [C]
        for vector in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            expected[f"blocks.{i}.att.{vector}"] = [1, 1, C]
        for letter, rank in (("w", 5), ("a", 6), ("v", 3), ("g", 7)):
            expected[f"blocks.{i}.att.{letter}1"] = [C, rank]
            expected[f"blocks.{i}.att.{letter}2"] = [rank, C]
        for matrix in ("receptance", "key", "value", "output"):
            expected[f"blocks.{i}.att.{matrix}.weight"] = [C, C]
        expected[f"blocks.{i}.att.r_k"] = [H, N]
        expected[f"blocks.{i}.ffn.x_k"] = [1, 1, C]
        expected[f"blocks.{i}.ffn.key.weight"] = [4 * C, C]
        expected[f"blocks.{i}.ffn.value.weight"] = [C, 4 * C]
    assert shapes == expected


@pytest.mark.parametrize(
    "prefix", ["", "_forward_module.", "module.", "model.", "_orig_mod.module.model."]
)
def test_takes_the_files_that_there_are(tmp_path, tensors, prefix):
    """Without block 0's unused value residual, squeezed, with trainers' prefixes, reordered."""
    expected = load_model(tmp_path / "source.pth")
    variant = {
        f"{prefix}{name}": x.squeeze()
        for name, x in reversed(tensors.items())
        if not name.startswith("blocks.0.att.v") or name.endswith("weight")
    }
    assert len(variant) == len(tensors) - 3
    torch.save(variant, tmp_path / "variant.pth")
    assert_same_model(load_model(tmp_path / "variant.pth"), expected)
    save_file(variant, tmp_path / "variant.safetensors")
    assert_same_model(load_model(tmp_path / "variant.safetensors"), expected)


def test_ranks_come_from_the_tensors(tensors):
    assert config_from_tensors(tensors) == SMALL


def test_refuses_an_unknown_name(tmp_path, tensors):
    refused({**tensors, "blocks.0.att.x_z": torch.zeros(1)}, tmp_path / "m.pth", "x_z: unknown")


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("blocks.1.att.w1", None, "blocks.1.att.w1: missing"),
        ("emb.weight", None, "has emb.weight; found"),
        ("blocks.0.att.r_k", None, "has blocks.0.att.r_k; found"),
        ("blocks.0.att.r_k", (2, 8), r"make up the width 24 of emb.weight, found \[2, 8\]"),
        ("blocks.2.att.a2", (7, 24), r"blocks.2.att.a2: expected the shape \[6, 24\].*\[7, 24\]"),
        ("blocks.1.att.x_r", (24, 1, 1), r"expected the shape \[1, 1, 24\].* found \[24, 1, 1\]"),
        ("blocks.0.att.w1", (24,), r"blocks.0.att.w1: expected a matrix, found the shape \[24\]"),
        ("head.weight", (30, 24), r"head.weight: expected the shape \[29, 24\]"),
        ("blocks.0.ffn.key.weight", (84, 24), r"expected the shape \[96, 24\]"),
    ],
)
def test_refuses_what_does_not_fit_together(tmp_path, tensors, name, shape, says):
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    refused(tensors, tmp_path / "m.pth", says)


def test_refuses_integers(tmp_path, tensors):
    tensors["ln_out.weight"] = tensors["ln_out.weight"].int()
    refused(tensors, tmp_path / "m.pth", "ln_out.weight: expected a dense tensor of bfloat16")


def test_refuses_a_tuned_state(tmp_path):
    refused({"blocks.0.att.time_state": torch.zeros(3, 8, 8)}, tmp_path / "m.pth", "tuned state")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_refuses_truncated_files(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    save_model(random_model(), path)
    whole = path.read_bytes()
    for length in (0, 7, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"m{suffix}: cannot be read .*truncated"):
            load_model(path)


def test_runs_nothing_that_a_file_says(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"emb.weight": Trap()}, tmp_path / "m.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap()))
    for name in ("m.pth", "plain.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_model(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    model = random_model(dtype=torch.float32)
    save_model(model, tmp_path / "m.pth")
    loaded = load_model(tmp_path / "m.pth")
    with (tmp_path / "m.pth").open("r+b") as file:
        file.write(bytes(1 << 16))
    assert_same_model(loaded, model)


def test_folder_of_a_run(tmp_path):
    models = {step: random_model(seed=step) for step in (9, 20, 100)}
    for step, model in models.items():
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_model(model, folder / "model.safetensors")
    (tmp_path / "checkpoints" / "step-00000200").mkdir()
    assert_same_model(load_model(tmp_path), models[100])
    assert_same_model(load_model(tmp_path / "checkpoints" / "step-00000020"), models[20])

    broken = tmp_path / "checkpoints" / "step-00000100" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="step-00000100.*truncated.*the checkpoint before"):
        assert_same_model(load_model(tmp_path), models[20])


def test_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"expected model\.safetensors, .*found none"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_model(tmp_path / "none.pth")


def test_metadata_and_suffixes(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "m.safetensors", {"step": "12"})
    with pytest.raises(ValueError, match="holds none"):
        save_model(model, tmp_path / "m.pth", {"step": "12"})
    with pytest.raises(ValueError, match=r"\.safetensors or \.pth, or .*, found m\.bin"):
        save_model(model, tmp_path / "m.bin")
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert len(load_file(tmp_path / "m.safetensors")) > 0


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"m{suffix}"
    model = random_model()
    save_model(model, path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_model(random_model(seed=5), path)
    assert_same_model(load_model(path), model)
    assert list(tmp_path.iterdir()) == [path]


def test_a_loaded_model_works(tmp_path):
    model = random_model(dtype=torch.float32)
    save_model(model, tmp_path / "m.pth")
    loaded = load_model(tmp_path / "m.pth", device="cpu")
    assert isinstance(loaded, RWKV7)
    tokens = random_tokens(SMALL, 2, 5)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    loaded(tokens)[0].sum().backward()


def test_block_numbers_run_from_zero(tensors, tmp_path):
    extra = {**tensors, "blocks.99999999.att.r_k": torch.zeros(3, 8)}
    refused(extra, tmp_path / "m.pth", r"m\.pth: blocks\.3: missing")
    refused({**tensors, "blocks.²": torch.zeros(1)}, tmp_path / "m.pth", "blocks.²: unknown")


def test_a_file_of_old_pytorch_loads(tensors, tmp_path):
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_model(load_model(tmp_path / "old.pth"), random_model(dtype=torch.float32))


@pytest.mark.parametrize("content", [b"", b"Call me Ishmael.\n", b"{}", b"\x80\x02.", b"\x00" * 99])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.pth: cannot be read as a PyTorch file") as met:
        load_model(tmp_path / "m.pth")
    assert "weights_only" not in str(met.value)  # no advice to run what the file says


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"device": "abacus"}, "device: 'abacus' cannot be used here"),
        ({"device": "cuda:77"}, "device: 'cuda:77' cannot be used here"),
        ({"device": torch.device("cuda:77")}, "device: 'cuda:77' cannot be used here"),
        ({"dtype": torch.int8}, r"dtype: expected bfloat16, .*, found torch\.int8"),
    ],
)
def test_device_and_dtype_are_checked_before_the_file(tmp_path, given, says):
    with pytest.raises(ValueError, match=says):
        load_model(tmp_path / "none.pth", **given)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to(torch.float8_e5m2)])
def test_tensors_of_another_kind_are_refused_by_name(tensors, tmp_path, change):
    tensors["blocks.1.att.key.weight"] = change(tensors["blocks.1.att.key.weight"])
    refused(tensors, tmp_path / "m.pth", r"blocks\.1\.att\.key\.weight: expected a dense tensor")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_loading_takes_one_copy_of_the_file(tmp_path):
    """The benchmark's own measure, on a file of 118 MB; mapped pages count."""
    sizes = ["--preset", "0.1b", "--layers", "8", "--vocabulary", "1024"]
    program = [sys.executable, str(BENCHMARK), str(tmp_path), *sizes, "--form", "pth", "folder"]
    subprocess.run(program, check=True, capture_output=True, text=True)
    (file,) = tmp_path.iterdir()
    parts = json.loads(file.read_text())["parts"]
    assert len(parts) == 2
    for part in parts:
        assert 1 <= part["copies"] < 1.15, part
