"""The names and shapes of flash-linear-attention's Hugging Face model, both ways."""

import json

import pytest
import torch
from random_model import SMALL, random_model
from safetensors.torch import load_file, save_file

from rwkv7 import ModelConfig, load_model, save_model
from rwkv7.weights import fla

# `RWKV7ForCausalLM(RWKV7Config(...)).state_dict()` of flash-linear-attention 0.6.0 under
# transformers 5.23, with width 128, ranks 32 (w), 64 (a), 48 (v), 96 (g), vocabulary 256.
PINNED = ModelConfig(
    vocab_size=256,
    width=128,
    layers=2,
    head_size=64,
    decay_rank=32,
    iclr_rank=64,
    value_rank=48,
    gate_rank=96,
)
EVERY_LAYER = {
    **{f"{norm}.{end}": [128] for norm in ("attn_norm", "ffn_norm") for end in ("weight", "bias")},
    **{f"attn.{mix}": [1, 1, 128] for mix in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")},
    "attn.k_k": [128],
    "attn.k_a": [128],
    "attn.r_k": [2, 64],
    **{f"attn.{p}_proj.weight": [128, 128] for p in ("r", "k", "v", "o")},
    "attn.w_lora.lora.0.weight": [32, 128],
    "attn.w_lora.lora.2.weight": [128, 32],
    "attn.w_lora.lora.2.bias": [128],
    "attn.a_lora.lora.0.weight": [64, 128],
    "attn.a_lora.lora.2.weight": [128, 64],
    "attn.a_lora.lora.2.bias": [128],
    "attn.g_lora.lora.0.weight": [96, 128],
    "attn.g_lora.lora.2.weight": [128, 96],
    "attn.g_norm.weight": [128],
    "attn.g_norm.bias": [128],
    "ffn.x_k": [128],
    "ffn.key.weight": [512, 128],
    "ffn.value.weight": [128, 512],
}
FIRST_LAYER = {"pre_norm.weight": [128], "pre_norm.bias": [128]}
LATER_LAYERS = {
    "attn.v_lora.lora.0.weight": [48, 128],
    "attn.v_lora.lora.2.weight": [128, 48],
    "attn.v_lora.lora.2.bias": [128],
}
EXPECTED = {
    "model.embeddings.weight": [256, 128],
    "model.norm.weight": [128],
    "model.norm.bias": [128],
    "lm_head.weight": [256, 128],
    **{f"model.layers.0.{n}": shape for n, shape in (EVERY_LAYER | FIRST_LAYER).items()},
    **{f"model.layers.1.{n}": shape for n, shape in (EVERY_LAYER | LATER_LAYERS).items()},
}


def same(model, other):
    return model.config == other.config and all(
        torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.fixture
def folder(tmp_path):
    """A saved Hugging Face folder of the small model, and its tensors and config."""
    model = random_model(dtype=torch.float32)
    path = tmp_path / "hf-0.1b"
    save_model(model, path)
    return model, path, load_file(path / "model.safetensors")


def rewrite(path, tensors, **changes):
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    about = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(about))


def test_names_and_shapes_are_those_of_its_model(tmp_path):
    model = random_model(PINNED, torch.bfloat16)
    save_model(model, tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: list(x.shape) for name, x in written.items()} == EXPECTED
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    ranks = [about[f"{name}_low_rank_dim"] for name in ("decay", "a", "v", "gate")]
    assert (about["model_type"], about["fuse_norm"], about["torch_dtype"]) == (
        "rwkv7",
        False,
        "bfloat16",
    )
    assert [about["head_dim"], about["hidden_size"], *ranks] == [64, 128, 32, 64, 48, 96]
    assert same(load_model(tmp_path / "hf"), model)


def test_low_rank_matrices_are_transposed_and_their_biases_are_vectors(folder):
    model, _, theirs = folder
    att = model.blocks[1].att
    for letter in "wavg":
        first = theirs[f"model.layers.1.attn.{letter}_lora.lora.0.weight"]
        second = theirs[f"model.layers.1.attn.{letter}_lora.lora.2.weight"]
        assert torch.equal(first, getattr(att, f"{letter}1").T)
        assert torch.equal(second, getattr(att, f"{letter}2").T)
    for letter in "wav":
        bias = theirs[f"model.layers.1.attn.{letter}_lora.lora.2.bias"]
        assert torch.equal(bias, getattr(att, f"{letter}0"))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(folder, suffix):
    model, path, theirs = folder
    (path / "model.safetensors").unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names, index = list(theirs), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{number:05d}-of-00002{suffix}"
        tensors = {name: theirs[name] for name in part}
        if suffix == ".bin":
            torch.save(tensors, path / shard)
        else:
            save_file(tensors, path / shard)
        index |= dict.fromkeys(part, shard)
    listing = path / f"{stem}{suffix}.index.json"
    listing.write_text(json.dumps({"weight_map": index}))
    assert same(load_model(path), model)

    (path / f"{stem}-00002-of-00002{suffix}").unlink()
    with pytest.raises(ValueError, match="00002-of-00002.* is not beside it"):
        load_model(path)
    listing.write_text(json.dumps({"weight_map": {"a": f"../{path.name}/{shard}"}}))
    with pytest.raises(ValueError, match=r"index\.json: the file '\.\./.* is not beside it"):
        load_model(path)
    listing.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: cannot be read"):
        load_model(path)


def test_pytorch_bin_and_prefixes(folder):
    model, path, theirs = folder
    (path / "model.safetensors").unlink()
    torch.save({f"module.{name}": x for name, x in theirs.items()}, path / "pytorch_model.bin")
    assert same(load_model(path), model)


def test_its_first_version_keeps_the_mixes_in_one(folder):
    model, path, theirs = folder
    for layer in range(SMALL.layers):
        mixes = [theirs.pop(f"model.layers.{layer}.attn.x_{letter}") for letter in "rwkvag"]
        theirs[f"model.layers.{layer}.attn.x_x"] = torch.cat(mixes).reshape(6, -1)
    rewrite(path, theirs)
    assert same(load_model(path), model)


def test_a_tied_head_is_the_embedding(folder):
    model, path, theirs = folder
    del theirs["lm_head.weight"]
    rewrite(path, theirs)
    with pytest.raises(ValueError, match=r"head\.weight: missing"):
        load_model(path)
    rewrite(path, theirs, tie_word_embeddings=True)
    assert torch.equal(load_model(path).head.weight, model.emb.weight)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "expected model_type 'rwkv7', found 'llama'"),
        ({"norm_eps": 1e-6}, "expected norm_eps 1e-05, found 1e-06"),
        ({"attn": {"layers": [1]}}, "expected attn None, found {'layers': "),
        ({"hidden_size": 48}, "expected hidden_size 24, found 48"),
        ({"gate_low_rank_dim": 8}, "expected gate_low_rank_dim 7, found 8"),
    ],
)
def test_refuses_a_config_that_says_something_else(folder, changes, says):
    _, path, theirs = folder
    rewrite(path, theirs, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: {says}"):
        load_model(path)


def test_refuses_foreign_and_misshapen_tensors(folder):
    _, path, theirs = folder
    rewrite(path, {**theirs, "model.layers.1.attn.q_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.attn\.q_proj\.weight: unknown"):
        load_model(path)
    name = "model.layers.2.attn.a_lora.lora.0.weight"
    rewrite(path, {**theirs, name: theirs[name].T.contiguous()})
    with pytest.raises(ValueError, match=r"blocks\.2\.att\.a1: expected the shape \[24, 6\]"):
        load_model(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read \(expected a JSON object"):
        load_model(path)


def test_every_official_name_has_one_there_and_back():
    model = random_model()
    ours = {name: fla.fla_tensor(name, x.detach())[0] for name, x in model.named_parameters()}
    reads = fla.official_reads(ours.values(), tied=False)
    assert {name: theirs for name, (theirs, _) in reads.items()} == ours
