"""Which parameter is in which group, and the schedule, against RWKV-7's recipe."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv7.config import ModelConfig
from rwkv7.nn import RWKV7
from rwkv7.training import TrainSettings
from rwkv7.training.optim import (
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)


@pytest.fixture
def model() -> RWKV7:
    return RWKV7(ModelConfig.from_sizes(vocab_size=16, width=16, layers=2, head_size=8))


def test_groups(model: RWKV7) -> None:
    bias, matrices, rest = parameter_groups(model, 0.1)
    assert bias["names"] == ["blocks.0.att.w0", "blocks.1.att.w0"]
    assert (bias["lr_scale"], bias["weight_decay"]) == (2.0, 0.0)
    inner = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in inner}
    assert set(matrices["names"]) == expected | {"emb.weight", "head.weight"}
    assert (matrices["lr_scale"], matrices["weight_decay"]) == (1.0, 0.1)
    assert (rest["lr_scale"], rest["weight_decay"]) == (1.0, 0.0)
    assert {"ln_out.weight", "blocks.1.att.w1", "blocks.0.att.r_k"} <= set(rest["names"])
    names = [*bias["names"], *matrices["names"], *rest["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_schedule() -> None:
    settings = TrainSettings(steps=110, lr=1e-3, lr_final=1e-4, warmup=10)
    assert learning_rate(settings, 0) == pytest.approx(1e-5)
    assert learning_rate(settings, 5) == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert learning_rate(settings, 10) == pytest.approx(1e-3)
    for step in (10, 37, 60, 109):
        progress, share = (step - 10) / 100, 0.1
        formula = (0.5 + share / 2) + (0.5 - share / 2) * math.cos(math.pi * progress)
        assert learning_rate(settings, step) == pytest.approx(1e-3 * formula)
    assert learning_rate(settings, 110) == pytest.approx(1e-4)
    short = TrainSettings(steps=3, warmup=10)  # the warm-up may be cut short
    assert 0 < learning_rate(short, 2) < short.lr


def test_adam_is_the_textbook_one_with_rates_by_group(model: RWKV7) -> None:
    settings = TrainSettings(lr=1e-2, weight_decay=0.1)
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, 1e-2)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    gradients = {
        name: torch.randn(p.shape, generator=generator) * 1e-3
        for name, p in model.named_parameters()
    }
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()
    optimizer.step()
    for name, p in model.named_parameters():
        rate = 2e-2 if "att.w0" in name else 1e-2
        decay = 0.1 if p.ndim == 2 and ".weight" in name else 0.0
        g = gradients[name].double()
        # After one step the moments, their bias corrected, are the gradient and its square.
        expected = before[name] * (1 - rate * decay) - rate * g / (g.abs() + 1e-18)
        assert torch.allclose(p.double(), expected, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"width": 100}, "width: expected a multiple of head_size, found 100"),
        ({"lr": 0.0}, "lr: expected above 0"),
        ({"lr": math.nan}, "lr: expected above 0"),
        ({"lr_final": 1.0}, "lr_final: expected from 0 to lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"seed": 2**63}, "seed: expected a whole number of 64 bits"),
        ({"sample_prompt": "\udcff"}, "sample_prompt: expected text"),
        ({"sample_prompt": "In"}, "sample_prompt: expected sample_every beside it"),
        ({"lora_rank": 8}, 'lora_rank: expected nothing with tune "full", found 8'),
        ({"recompute": "all"}, "recompute: expected one of nothing, cheap, layers"),
        ({"held_out": -1}, "held_out"),
        ({"dtype": "fp8"}, "dtype: expected one of auto, fp32, bf16, found 'fp8'"),
    ],
)
def test_settings_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**change)
