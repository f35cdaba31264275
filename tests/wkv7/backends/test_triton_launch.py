"""Compiling several kernels at once: nothing runs meanwhile, each compiles once, errors arrive."""

import contextlib

import pytest
import torch

from rwkv7.wkv7.backends.triton.launch import compiling_together, start


class Kernel:
    """What `start` asks of Triton's kernels, and what it was asked."""

    def __init__(self, error=None):
        self.launched, self.compiled, self.error = [], [], error

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))

    def warmup(self, *arguments, grid, **options):
        if self.error is not None:
            raise self.error
        self.compiled.append((grid, arguments, options))
        return {grid: None}


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


def test_inside_kernels_are_compiled_and_not_launched():
    one, other, x = Kernel(), Kernel(), torch.zeros(2)
    with compiling_together():
        start(one, (3,), (x, None, 7), {"K": 64})
        start(other, (4, 2), (x,), {"K": 64})
        assert not one.compiled
    assert [k.launched for k in (one, other)] == [[], []]
    assert one.compiled == [((3,), (x, None, 7), {"K": 64})] and len(other.compiled) == 1
    start(one, (5,), (x, None, 8), {"K": 64})
    assert one.launched == [((5,), (x, None, 8), {"K": 64})] and len(one.compiled) == 1


def test_a_form_is_compiled_once_and_another_apart():
    kernel, x = Kernel(), torch.zeros(2)
    with compiling_together():
        for grid in (3, 4):
            start(kernel, (grid,), (x,), {"K": 64})
        start(kernel, (3,), (x.half(),), {"K": 64})
        start(kernel, (3,), (None,), {"K": 64})
        start(kernel, (3,), (x,), {"K": 128})
    assert len(kernel.compiled) == 4


def test_what_does_not_compile_says_so_and_later_launches_run():
    kernel, broken, x = Kernel(), Kernel(ValueError("no such operation")), torch.zeros(2)
    with pytest.raises(ValueError, match="no such operation"), compiling_together():
        start(broken, (1,), (x,), {})
    start(kernel, (1,), (x,), {})
    assert kernel.launched


def test_an_error_inside_leaves_launches_as_they_were():
    kernel = Kernel()
    with pytest.raises(KeyError), compiling_together():
        start(kernel, (1,), (), {})
        raise KeyError
    start(kernel, (1,), (), {})
    assert len(kernel.launched) == 1 and not kernel.compiled
