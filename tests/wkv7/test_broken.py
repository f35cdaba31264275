"""Backends broken on purpose: the comparison must see each of these classic mistakes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from wkv7.cases import Case, Place, failures

from rwkv7.wkv7.backends.chunked import ChunkedBackend
from rwkv7.wkv7.contract import Call
from rwkv7.wkv7.tolerance import GRADIENTS

TORCH = Place("torch")
CASE = Case(T=40)  # K = V: a square state hides a transpose from every shape check


def _spoil_forward(monkeypatch: pytest.MonkeyPatch, change) -> None:
    forward = ChunkedBackend.forward
    monkeypatch.setattr(
        ChunkedBackend, "forward", lambda self, call, save: forward(self, change(call), save)
    )


def test_sound_before_it_is_broken() -> None:
    assert not failures(CASE, TORCH, torch.float32)


def test_a_transposed_state_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def transpose(call: Call) -> Call:
        return call if call.state is None else replace(call, state=call.state.mT)

    _spoil_forward(monkeypatch, transpose)
    assert {"y", "state"} <= failures(CASE, TORCH, torch.bfloat16).keys()
    # Without a state to transpose nothing shows, which is how the mistake survives elsewhere.
    assert not failures(replace(CASE, state="none"), TORCH, torch.bfloat16)


def test_a_and_b_swapped_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil_forward(monkeypatch, lambda call: replace(call, a=call.b, b=call.a))
    assert {"y", "state"} <= failures(CASE, TORCH, torch.bfloat16).keys()


def test_a_decay_one_token_late_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil_forward(monkeypatch, lambda call: replace(call, w=call.w.roll(1, 1)))
    assert {"y", "state"} <= failures(CASE, TORCH, torch.bfloat16).keys()


@pytest.mark.parametrize("which", range(7))
def test_a_dropped_gradient_is_seen(monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    backward = ChunkedBackend.backward

    def drop(self, call, saved, dy, dstate) -> tuple[Tensor, ...]:
        grads = list(backward(self, call, saved, dy, dstate))
        grads[which] = torch.zeros_like(grads[which])
        return tuple(grads)

    monkeypatch.setattr(ChunkedBackend, "backward", drop)
    assert GRADIENTS[which] in failures(CASE, TORCH, torch.bfloat16)
