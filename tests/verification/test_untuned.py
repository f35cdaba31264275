"""Kernels of another package run untuned, and are as before afterwards."""

from __future__ import annotations

import sys
import types

import pytest

from rwkv7.verification.untuned import untuned


class Tuner:
    """As triton.runtime.Autotuner: configurations, and the function under it."""

    def __init__(self, *configs: int) -> None:
        self.configs, self.fn = list(configs), lambda: None


class Heuristics:
    """As triton.runtime.Heuristics: only wraps."""

    def __init__(self, fn: Tuner) -> None:
        self.fn = fn


def test_the_first_configuration_inside_and_all_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, wrapped, other = Tuner(1, 2, 3), Tuner(4, 5), Tuner(6, 7)
    for name, names in {
        "peer": {},
        "peer.ops": {"bare": bare, "again": bare, "wrapped": Heuristics(wrapped)},
        "peerless": {"other": other},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(KeyError), untuned("peer"):
        assert (bare.configs, wrapped.configs, other.configs) == ([1], [4], [6, 7])
        raise KeyError
    assert (bare.configs, wrapped.configs) == ([1, 2, 3], [4, 5])
