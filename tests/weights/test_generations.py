"""Every other generation of RWKV is refused by its own name, with what it would need."""

import pytest
import torch

from rwkv7 import load_model
from rwkv7.weights.generations import other_generation, refuse_other

V7 = ["emb.weight", "blocks.0.ln0.weight", "blocks.0.att.x_r", "blocks.0.att.r_k"]
# Some names of each one's checkpoints.
NAMES = {
    "RWKV-4": ["emb.weight", "blocks.0.att.time_decay", "blocks.0.att.time_mix_k"],
    "RWKV-5": ["emb.weight", "blocks.0.att.time_decay", "blocks.0.att.ln_x.weight"],
    "RWKV-6": [
        "emb.weight",
        "blocks.0.att.time_maa_x",
        "blocks.0.att.time_decay",
        "blocks.0.att.ln_x.weight",
    ],
    "RWKV-7a": [*V7, "blocks.0.ffn.s_emb.weight", "blocks.0.ffn.s1"],
    "RWKV-7b": [*V7, "blocks.0.ffn.s_emb.weight", "blocks.0.qkv.qq.weight"],
    "RWKV-8 \\(DeepEmbed": [*V7, "blocks.0.ffn.enn.weight"],
    "RWKV-8 hybrid": [*V7, "blocks.0.ffn.enn.weight", "blocks.0.qkv.kk.weight"],
    "RWKV-8 ROSA": [*V7, "blocks.1.rosa.emb"],
}
# Its scripts' own: layers that are called "rosa" within, beside or instead of time mix, or "att".
ROSA = (
    ["e.weight", "emb_rosa.emb.weight", "rosa1.emb0", "rosa1.emb1", "o.weight"],
    ["e.weight", "ln1a.weight", "rwkv1.x_r", "rwkv1.r_k", "rosa1.x_q", "rosa1.rosa_qkv.emb"],
    ["emb.weight", "blocks.0.ln3.weight", "blocks.0.rosa.q.weight", "blocks.0.rosa.rosa_qkv.emb"],
    ["emb.weight", *(f"blocks.0.att.{part}" for part in ("x_q", "x_k", "x_v", "q", "k", "v", "o"))],
)


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_name(name, tmp_path):
    torch.save({tensor: torch.zeros(1) for tensor in NAMES[name]}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=rf"m\.pth: .*found {name}.*it would need"):
        load_model(tmp_path / "m.pth")


@pytest.mark.parametrize("names", ROSA)
def test_rosa_by_any_of_its_scripts_names(names):
    with pytest.raises(ValueError, match="found RWKV-8 ROSA, .* a suffix automaton"):
        refuse_other(names)


def test_a_hugging_face_model_of_another_generation():
    names = ["rwkv.embeddings.weight", "rwkv.blocks.0.attention.time_decay"]
    assert other_generation(names) == "RWKV-4"


def test_plain_names_pass():
    assert other_generation(V7) is None
    refuse_other(V7)
    with pytest.raises(ValueError, match=r"which has emb\.weight; found model\.layers\.0"):
        refuse_other(["model.layers.0.self_attn.q_proj.weight"])
