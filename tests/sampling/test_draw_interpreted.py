"""The sampling kernel under Triton's interpreter: row for row the token that plain torch draws."""

import pytest
import torch
from triton_interpreter import load

from rwkv7.sampling import Sampler, batch, sample_batch

load("rwkv7.sampling.kernels", "draw")
pytestmark = pytest.mark.usefixtures("interpreter")

SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_k": 1},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.0},
    {"top_p": 0.95, "temperature": 0.5},
    {"top_p": 0.95, "temperature": 1.7, "order": "hf"},
    {"min_p": 0.05},
    {"min_p": 0.3, "order": "hf", "temperature": 2.0},
    {"top_k": 40, "top_p": 0.8, "order": "hf", "temperature": 0.7},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"top_k": 3, "top_p": 0.99, "order": "hf"},
    {"presence": 2.0, "frequency": 1.0, "decay": 0.9, "top_p": 0.7},
]


@pytest.fixture
def by_kernel(monkeypatch):
    """Has the kernel draw, in small blocks; counts the rows that it is unsure of."""
    monkeypatch.setattr(batch, "_has_kernel", lambda device: True)
    monkeypatch.setattr(batch, "_BLOCK", 256)
    monkeypatch.setattr(batch, "_FEW", 128)
    unsure, draw = [], batch._draw

    def counted(logits, samplers, few):
        if few >= logits.shape[1]:
            unsure.append(len(samplers))
        return draw(logits, samplers, few)

    monkeypatch.setattr(batch, "_draw", counted)
    return unsure


def samplers():
    return [Sampler(seed=i, **settings) for i, settings in enumerate(SETTINGS)]


def logits(spread, V=1000, ties=False):
    generator = torch.Generator().manual_seed(V)
    z = torch.randn(len(SETTINGS), V, generator=generator) * spread
    return (z * 2).round() / 2 if ties else z


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("spread", "some_unsure"), [(9.0, False), (0.1, True)])
def test_the_same_tokens_as_plain_torch(spread, some_unsure, ties, by_kernel, monkeypatch):
    z = logits(spread, ties=ties)
    own, plain = samplers(), samplers()
    found = [sample_batch(z, own) for _ in range(5)]
    assert bool(by_kernel) == some_unsure or ties
    monkeypatch.setattr(batch, "_has_kernel", lambda device: False)
    assert found == [sample_batch(z, plain) for _ in range(5)]


def test_rows_that_have_no_token(by_kernel):
    z = logits(9.0)
    z[0, 5], z[1, 700], z[2] = torch.nan, torch.inf, -torch.inf
    z[3, :999] = z[4, 1:] = -torch.inf
    found = sample_batch(z, samplers())
    assert found[:5] == [None, None, None, 999, 0]
    assert None not in found[5:]


def test_sixteen_bits_and_rows_apart(by_kernel, monkeypatch):
    z = torch.cat((logits(3.0), logits(3.0)), 1).bfloat16()[:, :1000]
    found = sample_batch(z, samplers())
    monkeypatch.setattr(batch, "_has_kernel", lambda device: False)
    assert found == sample_batch(z, samplers())
