"""Starting Triton's kernels: by the compiled one from the second time on; compiled several at once,
when nothing runs meanwhile, each compiles once, and errors arrive."""

import contextlib
import types

import pytest
import torch

from rwkv7.wkv7.backends.triton import launch
from rwkv7.wkv7.backends.triton.launch import Part, Variant, compiling_together, start
from rwkv7.wkv7.backends.triton.saved import carve


class Kernel:
    """What `start` asks of Triton's kernels, and what it was asked."""

    def __init__(self, error=None, keeps=False):
        self.launched, self.compiled, self.error = [], [], error
        self.keeps, self.kept = keeps, self._Compiled()

    class _Compiled:
        """Remembers with what it was started, by itself and as Triton starts it."""

        function, packed_metadata = "function", "metadata"

        def __init__(self):
            self.started, self.by_triton = [], []

        def run(self, *arguments):
            self.started.append(arguments)

        def __getitem__(self, grid):
            return lambda *arguments: self.by_triton.append((grid, arguments))

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
def hooks(monkeypatch):
    """No card, and Triton's hooks, which nobody has set."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: "stream", raising=False
    )
    found = types.SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(launch, "_place_of_hooks", lambda: found)
    return found


def test_inside_kernels_are_compiled_and_not_launched():
    one, other, x = Kernel(), Kernel(), torch.zeros(2)
    variant = Variant(one, K=64)
    with compiling_together():
        start(variant, (3,), (x, None, 7))
        start(Variant(other, K=64), (4, 2), (x,))
        assert not one.compiled
    assert [k.launched for k in (one, other)] == [[], []]
    assert one.compiled == [((3,), (x, None, 7), {"K": 64})] and len(other.compiled) == 1
    start(variant, (5,), (x, None, 8))
    assert one.launched == [((5,), (x, None, 8), {"K": 64})] and len(one.compiled) == 1


def test_a_form_is_compiled_once_and_another_apart():
    kernel, x = Kernel(), torch.zeros(2)
    variant, other = Variant(kernel, K=64), Variant(kernel, K=128)
    with compiling_together():
        for grid in (3, 4):
            start(variant, (grid,), (x,))
        start(variant, (3,), (x.half(),))
        start(variant, (3,), (None,))
        start(other, (3,), (x,))
    assert len(kernel.compiled) == 4


def test_what_does_not_compile_says_so_and_later_launches_run():
    kernel, broken, x = Kernel(), Kernel(ValueError("no such operation")), torch.zeros(2)
    with pytest.raises(ValueError, match="no such operation"), compiling_together():
        start(Variant(broken), (1,), (x,))
    start(Variant(kernel), (1,), (x,))
    assert kernel.launched


def test_an_error_inside_leaves_launches_as_they_were():
    kernel = Kernel()
    with pytest.raises(KeyError), compiling_together():
        start(Variant(kernel), (1,), ())
        raise KeyError
    start(Variant(kernel), (1,), ())
    assert len(kernel.launched) == 1 and not kernel.compiled


def test_what_is_compiled_is_started_itself_with_addresses_and_its_constants_in_order():
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    variant = Variant(kernel, num_warps=4, LOGIT=True, K=64)
    for n in (1, 2, 3):
        start(variant, (n, 5), (x, None, n))
    assert [grid for grid, *_ in kernel.launched] == [(1, 5)]
    how, nobody = ("stream", "function", "metadata"), (None, None, None)
    assert kernel.kept.started == [
        (n, 5, 1, *how, *nobody, x.data_ptr(), None, n, 64, True) for n in (2, 3)
    ]


@pytest.mark.parametrize("when", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("hook", [print, types.SimpleNamespace(calls=[print])])
def test_where_somebody_watches_launches_triton_starts_them(when, hook, hooks):
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    variant = Variant(kernel, K=64, LOGIT=True)
    start(variant, (1,), (x, None, 1))
    setattr(hooks, when, hook)
    start(variant, (2,), (x, None, 1))
    assert kernel.kept.by_triton == [((2, 1, 1), (x, None, 1, 64, True))]
    setattr(hooks, when, types.SimpleNamespace(calls=[]))
    start(variant, (3,), (x, None, 1))
    assert [grid for grid, *_ in kernel.kept.started] == [3]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x.half(), None, 1),
        lambda x: (x[1:], None, 1),  # not on 16 bytes
        lambda x: (x, x, 1),
        lambda x: (x, None, 2**31),
    ],
)
def test_another_form_is_left_to_triton(other):
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    variant = Variant(kernel, K=64, LOGIT=True)
    start(variant, (1,), (x, None, 1))
    start(variant, (1,), other(x))
    assert len(kernel.launched) == 2 and not kernel.kept.started


def test_another_variant_is_left_to_triton():
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    for K in (64, 128):
        start(Variant(kernel, K=K, LOGIT=True), (1,), (x, None, 1))
    assert len(kernel.launched) == 2 and not kernel.kept.started


def test_parts_of_memory_are_apart_and_are_tensors_for_triton_alone():
    x = torch.zeros(8)
    parts = carve(x, (torch.float16, 3), (torch.float32, 5))
    kernel = Kernel(keeps=True)
    variant = Variant(kernel, K=64, LOGIT=True)
    for _ in range(2):
        start(variant, (1,), (*parts, 1))
    ((_, (half, single, _), _),) = kernel.launched
    assert (half.dtype, half.shape) == (torch.float16, (3,))
    assert (single.dtype, single.shape) == (torch.float32, (5,))
    half.fill_(1)
    assert torch.equal(single.fill_(2).unique(), torch.tensor([2.0])) and (half == 1).all()
    addresses = [half.data_ptr(), single.data_ptr()]
    ((*_, first, second, _, _, _),) = kernel.kept.started
    assert [first, second] == addresses and not any(address % 16 for address in addresses)


def test_a_part_begins_where_it_says():
    memory = torch.arange(8, dtype=torch.float32)
    part = Part(memory, memory.data_ptr(), torch.float32, 8, 3)
    assert part.tensor().tolist() == [2, 3, 4] and part.address == memory[2:].data_ptr()


def test_an_interpreter_which_compiles_nothing_runs_every_time():
    kernel, x = Kernel(), torch.zeros(8)
    variant = Variant(kernel, K=64, LOGIT=True)
    for _ in range(2):
        start(variant, (1,), (x, None, 1))
    assert len(kernel.launched) == 2


def test_on_amd_cards_triton_starts_all_for_it_also_compiles_for_how_large_memory_is(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    variant = Variant(kernel, K=64, LOGIT=True)
    for n in (1, 2):
        start(variant, (n,), (x, None, 1))
    assert [grid for grid, *_ in kernel.launched] == [(1,), (2,)] and not kernel.kept.started


@pytest.mark.parametrize("settings", [True, False], ids=["3.4 on", "before"])
def test_hooks_are_looked_for_where_triton_has_them(settings, monkeypatch):
    monkeypatch.undo()
    place = types.SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    with_settings = types.SimpleNamespace(knobs=types.SimpleNamespace(runtime=place))
    modules = {
        "triton": with_settings if settings else types.SimpleNamespace(),
        "triton.compiler": types.SimpleNamespace(CompiledKernel=place),
    }
    monkeypatch.setattr(launch.importlib, "import_module", modules.__getitem__)
    launch._place_of_hooks.cache_clear()
    try:
        assert launch._place_of_hooks() is place and not launch._is_watched()
    finally:
        launch._place_of_hooks.cache_clear()
