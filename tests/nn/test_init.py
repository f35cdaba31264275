"""The official initialisation, each formula worked out again for single channels."""

import math

import pytest
import torch

from rwkv7 import RWKV7, ModelConfig
from rwkv7.nn import initialise_

CONFIG = ModelConfig.from_sizes(vocab_size=700, width=320, layers=3)
L, C, N = 3, 320, 64


@pytest.fixture(scope="module")
def model():
    model = RWKV7(CONFIG, torch.float64)
    initialise_(model, torch.Generator().manual_seed(5))
    return model


def assert_channels(x, formula):
    for i in (0, 1, 31, 63, 64, 100, 318, 319):
        assert x[i].item() == pytest.approx(formula(i), abs=1e-12), i


def zigzag(i):
    z = (i % N - (N - 1) / 2) / ((N - 1) / 2)
    return z * abs(z)


@pytest.mark.parametrize("layer", range(L))
def test_vectors(model, layer):
    att, ffn = model.blocks[layer].att, model.blocks[layer].ffn
    later = 1 - layer / L
    for x, power in (
        (att.x_r, 0.2),
        (att.x_w, 0.9),
        (att.x_k, 0.7),
        (att.x_v, 0.7),
        (att.x_a, 0.9),
        (att.x_g, 0.2),
    ):
        assert_channels(x, lambda i, power=power: 1 - math.pow(i / C, power * later))
    assert_channels(ffn.x_k, lambda i: 1 - math.pow(i / C, later**4))
    depth = layer / (L - 1)
    assert_channels(
        att.w0, lambda i: -5.5 + 6 * (i / (C - 1)) ** (1 + depth**0.3) + 2.5 * zigzag(i)
    )
    assert_channels(att.a0, lambda i: -0.19 + 0.3 * zigzag(i) + 0.4 * (i / (C - 1) - 0.5))
    assert_channels(att.k_k, lambda i: 0.71 - 0.1 * (i / (C - 1) - 0.5))
    assert_channels(att.k_a, lambda i: 1.02)
    if layer:
        assert_channels(att.v0, lambda i: 0.73 - 0.4 * (i / (C - 1) - 0.5))
    assert (att.r_k == -0.04).all()
    assert_channels(att.ln_x.weight, lambda i: ((1 + layer) / L) ** 0.7)
    assert not att.ln_x.bias.any()


def test_norms(model):
    norms = [x for n, x in model.named_parameters() if "ln" in n and "ln_x" not in n]
    assert len(norms) == 2 * (1 + 2 * L + 1)
    for name, x in model.named_parameters():
        if "ln" in name and "ln_x" not in name:
            assert (x == (1 if name.endswith("weight") else 0)).all(), name


def test_zeros(model):
    for block in model.blocks:
        att = block.att
        firsts = [att.w1, att.a1, att.g1] + ([att.v1] if att.mixes_value else [])
        for x in (*firsts, att.output.weight, block.ffn.value.weight):
            assert not x.any()


def test_orthogonal_matrices(model):
    def assert_orthogonal(x, gain):
        x = x if x.shape[0] >= x.shape[1] else x.T
        expected = gain**2 * torch.eye(x.shape[1], dtype=x.dtype)
        torch.testing.assert_close(x.T @ x, expected, rtol=0, atol=1e-5 * gain**2)

    assert_orthogonal(model.head.weight, 0.5 * math.sqrt(700 / 320))
    for block in model.blocks:
        att = block.att
        assert_orthogonal(att.receptance.weight, 1.0)
        assert_orthogonal(att.key.weight, 0.1)
        assert_orthogonal(att.value.weight, 1.0)
        assert_orthogonal(block.ffn.key.weight, 1.0)
        for x in (att.w2, att.a2, att.g2, *([att.v2] if att.mixes_value else [])):
            assert_orthogonal(x, 0.1)


def test_orthogonal_matrices_have_no_preferred_sign(model):
    # As it comes from LAPACK, a factor's first element is never positive.
    corners = [
        bool(linear.weight[0, 0] > 0)
        for block in model.blocks
        for linear in (block.att.receptance, block.att.key, block.att.value)
    ]
    assert {True, False} == set(corners)


def test_embedding_and_a_narrow_head(model):
    emb = model.emb.weight
    assert emb.abs().max().item() <= 1e-4
    assert emb.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.02)
    narrow = RWKV7(ModelConfig.from_sizes(vocab_size=100, width=128, layers=1))
    torch.testing.assert_close(
        narrow.head.weight @ narrow.head.weight.T, 0.25 * torch.eye(100), rtol=0, atol=1e-5
    )


def test_one_layer_is_finite():
    model = RWKV7(ModelConfig.from_sizes(vocab_size=10, width=64, layers=1))
    assert all(bool(x.isfinite().all()) for x in model.parameters())
    att = model.blocks[0].att
    assert att.w0[63].item() == pytest.approx(-5.5 + 6 + 2.5)
    assert att.ln_x.weight[0].item() == 1


def test_low_precision_is_the_rounded_one():
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    wide, narrow = RWKV7(CONFIG), RWKV7(CONFIG, torch.bfloat16)
    initialise_(wide, generators[0])
    initialise_(narrow, generators[1])
    for (name, x), y in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert torch.equal(x.bfloat16(), y), name


def test_a_generator_decides_everything():
    models = [RWKV7(CONFIG) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        initialise_(model, torch.Generator().manual_seed(seed))
    first, same, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["emb.weight"], other["emb.weight"])
    assert not torch.equal(first["blocks.1.ffn.key.weight"], other["blocks.1.ffn.key.weight"])


def test_meta_models_take_no_memory():
    model = RWKV7(ModelConfig.preset("13.3b"), device="meta")
    assert sum(x.numel() for x in model.parameters()) > 13e9
