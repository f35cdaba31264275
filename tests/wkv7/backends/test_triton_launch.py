"""Starting Triton's kernels: what is compiled is started itself; what a call lacks is compiled at
the same time, each once, while its memory is free, and errors arrive."""

import contextlib
import threading
import types
import weakref

import pytest
import torch

from rwkv7.wkv7.backends.triton import launch
from rwkv7.wkv7.backends.triton.launch import Part, Variant, run_together, start
from rwkv7.wkv7.backends.triton.saved import carve


class Kernel:
    """What `start` asks of Triton's kernels, and what it was asked."""

    def __init__(self, error=None, keeps=False, meet=None):
        self.launched, self.compiled, self.error = [], [], error
        self.keeps, self.kept = keeps, self._Compiled()
        self.meet = meet  # a barrier for those that compile at the same time

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
        if self.meet is not None:
            self.meet.wait(5)
        if self.error is not None:
            raise self.error
        kinds = [(x.dtype, x.data_ptr() % 16) if hasattr(x, "dtype") else x for x in arguments]
        self.compiled.append((kinds, options))
        return self.kept if self.keeps else None

    def started(self):
        """Of its launches, by whomever, the arguments."""
        return [x[9:] for x in self.kept.started] + [x for _, x, _ in self.launched]


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


def launches(*several):
    """A call that starts (variant, grid, arguments) one after the other."""

    def run():
        for each in several:
            start(*each)
        return "done"

    return run


def test_what_a_call_lacks_is_compiled_at_the_same_time_before_it_is_started():
    meet = threading.Barrier(2)
    one, other = Kernel(keeps=True, meet=meet), Kernel(keeps=True, meet=meet)
    first, second = Variant(one, K=64, LOGIT=True), Variant(other, K=64, LOGIT=True)
    x = torch.zeros(8)
    run = launches((first, (3,), (x, None, 7)), (second, (4, 2), (x.half(), x[1:], 2**31)))
    assert run_together(run) == "done"  # else the barrier breaks
    options = {"K": 64, "LOGIT": True}
    assert one.compiled == [([(torch.float32, 0), None, 0], options)]
    found = [(torch.float16, 0), (torch.float32, 1), 2**31]
    assert other.compiled == [(found, options)]
    assert len(one.kept.started) == len(other.kept.started) == 1
    assert not one.launched and not other.launched
    assert run_together(run) == "done"
    assert len(one.compiled) == len(other.compiled) == 1 and len(one.kept.started) == 2


def test_what_follows_is_compiled_too_and_not_started():
    meet = threading.Barrier(2)
    now, later = Kernel(keeps=True, meet=meet), Kernel(keeps=True, meet=meet)
    x = torch.zeros(8)
    run = launches((Variant(now, K=64, LOGIT=True), (1,), (x, None, 1)))
    following = Variant(later, K=64, LOGIT=True)
    then = launches((following, (1,), (x, None, 1)))
    run_together(run, then)
    assert len(later.compiled) == 1 and not later.started() and len(now.started()) == 1
    run_together(then)
    assert len(later.compiled) == 1 and len(later.kept.started) == 1


def test_what_follows_is_not_looked_at_where_nothing_is_lacking():
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    run = launches((Variant(kernel, K=64, LOGIT=True), (1,), (x, None, 1)))
    run_together(run)
    run_together(run, then=lambda: pytest.fail("looked at"))
    assert len(kernel.compiled) == 1


def test_a_form_is_compiled_once_and_another_apart():
    kernel, x = Kernel(keeps=True), torch.zeros(8)
    variant, other = Variant(kernel, K=64, LOGIT=True), Variant(kernel, K=128, LOGIT=True)
    forms = [(x, None, 1), (x.half(), None, 1), (x, x, 1), (x[1:], None, 1), (x, None, 2**31)]
    run_together(launches(*((variant, (1,), form) for form in (*forms, *forms))))
    assert len(kernel.compiled) == 5 and len(kernel.kept.started) == 10
    run_together(launches((variant, (1,), forms[0]), (other, (1,), forms[0])))
    assert len(kernel.compiled) == 6 and len(kernel.kept.started) == 10 + 1 + 2


def test_a_call_that_lacks_one_kernel_compiles_that_one_and_starts_all_once_more():
    one, other, x = Kernel(keeps=True), Kernel(keeps=True), torch.zeros(8)
    first, second = Variant(one, K=64, LOGIT=True), Variant(other, K=64, LOGIT=True)
    start(first, (1,), (x, None, 1))
    run_together(launches((first, (2,), (x, None, 1)), (second, (2,), (x, None, 1))))
    assert not one.compiled and len(other.compiled) == 1
    assert len(one.kept.started) == 2 and len(other.kept.started) == 1


def test_memory_of_a_call_is_free_while_it_is_gone_through_and_compiled():
    alive, parts = [], []

    class Watching(Kernel):
        def warmup(self, *arguments, grid, **options):
            alive.extend(x() for x in parts)
            return super().warmup(*arguments, grid=grid, **options)

    kernel, saved = Watching(keeps=True), torch.zeros(8)
    variant = Variant(kernel, K=64, LOGIT=True)

    def run():
        alive.extend(x() for x in parts)
        tensor, part = torch.zeros(8), carve(saved, (torch.float32, 8))[0]
        parts.extend((weakref.ref(tensor), weakref.ref(part._memory)))
        start(variant, (1,), (tensor, part, 1))
        start(Variant(kernel, K=64, LOGIT=False), (1,), (tensor, saved, 1))

    run_together(run)
    assert len(parts) == 6 and len(alive) == 2 + 2 * 4 + 4 and set(alive) == {None}


def test_what_does_not_compile_says_so_and_later_launches_run():
    kernel, broken, x = Kernel(keeps=True), Kernel(ValueError("no such operation")), torch.zeros(2)
    fine = Variant(kernel, K=64, LOGIT=True), (1,), (x, None, 1)
    with pytest.raises(ValueError, match="no such operation"):
        run_together(launches(fine, (Variant(broken), (1,), (x,))))
    assert not kernel.started() and len(kernel.compiled) == 1
    start(*fine)
    assert len(kernel.kept.started) == 1


@pytest.mark.parametrize("when", ["at first", "gone through"])
def test_an_error_of_the_call_leaves_launches_as_they_were(when):
    kernel, calls, x = Kernel(keeps=True), [], torch.zeros(2)
    missing = Variant(Kernel(keeps=True), K=64, LOGIT=True)

    def run():
        calls.append(None)
        if when == "gone through" and len(calls) == 1:
            start(missing, (1,), (x, None, 1))
        raise KeyError

    with pytest.raises(KeyError):
        run_together(run)
    start(Variant(kernel, K=64, LOGIT=True), (1,), (x, None, 1))
    assert len(kernel.launched) == 1 and not kernel.compiled


def test_two_threads_compile_a_form_once_and_other_threads_launch_as_ever():
    entered, go, x = threading.Event(), threading.Event(), torch.zeros(8)

    class Slow(Kernel):
        def warmup(self, *arguments, grid, **options):
            entered.set()
            assert go.wait(5)
            return super().warmup(*arguments, grid=grid, **options)

    kernel, meanwhile = Slow(keeps=True), Kernel(keeps=True)
    run = launches((Variant(kernel, K=64, LOGIT=True), (1,), (x, None, 1)))
    threads = [threading.Thread(target=run_together, args=(run,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert entered.wait(5)
    start(Variant(meanwhile, K=64, LOGIT=True), (1,), (x, None, 1))
    assert len(meanwhile.launched) == 1 and not kernel.started()
    go.set()
    for thread in threads:
        thread.join(5)
    assert len(kernel.compiled) == 1 and len(kernel.kept.started) == 2


def test_a_kernel_that_triton_does_not_hand_out_is_launched_by_it():
    kernel, x = Kernel(), torch.zeros(8)
    run_together(launches((Variant(kernel, K=64, LOGIT=True), (1,), (x, None, 1))))
    assert len(kernel.launched) == 1


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


def test_on_amd_cards_what_a_call_lacks_is_compiled_at_the_same_time_too(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    meet = threading.Barrier(2)
    kernel, x = Kernel(keeps=True, meet=meet), torch.zeros(8)
    large = torch.empty(2**31, dtype=torch.uint8, device="meta")
    part, variant = Part(large, 0, torch.float32, 0, 8), Variant(kernel, K=64, LOGIT=True)
    run = launches((variant, (1,), (x, None, 1)), (variant, (2,), (part, None, 1)))
    for _ in range(2):
        run_together(run)
    assert len(kernel.compiled) == 2 and not kernel.kept.started
    assert [grid for grid, *_ in kernel.launched] == [(1,), (2,)] * 2


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
