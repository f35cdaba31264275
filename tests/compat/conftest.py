"""Inputs as a model makes them: unit keys, learning rates in (0, 1), decay logits of both signs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def model_inputs():
    def make(B=2, T=19, H=2, K=64, V=64, dtype=torch.float64, seed=0) -> SimpleNamespace:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        kk = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
        rate = normal(B, T, H, K).sigmoid()
        x = {
            "r": normal(B, T, H, K),
            "logit": 3 * normal(B, T, H, K) - 2,
            "k": normal(B, T, H, K),
            "v": normal(B, T, H, V),
            "a": -kk,
            "b": kk * rate,
            "kk": kk,
            "rate": rate,
        }
        return SimpleNamespace(
            **{name: value.to(dtype) for name, value in x.items()},
            state=normal(B, H, V, K),
        )

    return make
