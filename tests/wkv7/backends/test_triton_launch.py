"""Starting Triton's kernels: by the compiled one from the second time on; compiled several at once,
when nothing runs meanwhile, each compiles once, and errors arrive."""

import contextlib

import pytest
import torch

from rwkv7.wkv7.backends.triton.launch import compiling_together, start


class Kernel:
    """What `start` asks of Triton's kernels, and what it was asked."""

    def __init__(self, error=None, keeps=False):
        self.launched, self.compiled, self.error = [], [], error
        self.keeps, self.kept = keeps, self._Compiled()

    class _Compiled:
        """Remembers with what it was started."""

        def __init__(self):
            self.started = []

        def __getitem__(self, grid):
            return lambda *arguments: self.started.append((grid, arguments))

    arg_names = ("x", "y", "n", "K", "LOGIT")

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.launched.append((grid, arguments, options))
            return self.kept if self.keeps else None

        return run

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


def test_what_is_compiled_is_started_itself_with_its_constants_in_order():
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    options = {"num_warps": 4, "LOGIT": True, "K": 64}
    for n in (1, 2, 3):
        start(kernel, (n, 5), (x, None, n), options)
    assert [grid for grid, *_ in kernel.launched] == [(1, 5)]
    assert kernel.kept.started == [((n, 5, 1), (x, None, n, 64, True)) for n in (2, 3)]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.half(), None, 1), {"K": 64}),
        lambda x: ((x[1:], None, 1), {"K": 64}),  # not on 16 bytes
        lambda x: ((x, x, 1), {"K": 64}),
        lambda x: ((x, None, 2**31), {"K": 64}),
        lambda x: ((x, None, 1), {"K": 128}),
    ],
)
def test_another_form_is_left_to_triton(other):
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    start(kernel, (1,), (x, None, 1), {"K": 64, "LOGIT": True})
    arguments, options = other(x)
    start(kernel, (1,), arguments, {**options, "LOGIT": True})
    assert len(kernel.launched) == 2 and not kernel.kept.started


def test_an_interpreter_which_compiles_nothing_runs_every_time():
    kernel, x = Kernel(), torch.zeros(8)
    for _ in range(2):
        start(kernel, (1,), (x, None, 1), {"K": 64, "LOGIT": True})
    assert len(kernel.launched) == 2
