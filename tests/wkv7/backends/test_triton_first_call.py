"""First calls of the backend `triton`: all kernels that one lacks are compiled at the same time, as
what will be started, and in no more memory than later calls take.

On a CPU tensors say that they are on a card, and nothing is compiled or started.
"""

import functools
import importlib
from dataclasses import replace

import pytest
import torch
from wkv7.cases import Case, make_inputs

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.backends.triton import TritonBackend, launch, plan
from rwkv7.wkv7.backends.triton.launch import Part
from rwkv7.wkv7.contract import Call

HERE = "rwkv7.wkv7.backends.triton"
FORWARD = ["step_images", "walk_segments"]
BACKWARD = ["prepare_steps", "rewalk_steps", "rewalk_steps", "step_gradients"]


@pytest.fixture
def nothing_compiled():
    """All variants are forgotten, before and after, and so is what was compiled of them."""
    pytest.importorskip("triton")
    routes = [importlib.import_module(f"{HERE}.{x}") for x in ("back_route", "step_route")]
    routes += [importlib.import_module(f"{HERE}.{x}") for x in ("segments", "token_route")]

    def forget():
        for route in routes:
            for made in vars(route).values():
                if hasattr(made, "cache_clear"):
                    made.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def compiled(nothing_compiled, monkeypatch):
    """The kernels that were compiled at the same time, each time, all others by themselves."""
    found = []

    def compile_together(lacking):
        found.append([variant.kernel.__name__ for variant, _ in lacking])
        for variant, form in lacking:
            variant.compiled[form] = Nothing()

    class Nothing:
        def start(self, *launch):
            pass

    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(plan, "_generation", lambda device: 9)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(launch, "_compile_together", compile_together)
    return found


def a_call(T=65, B=1, H=1, offset=0, offsets=None, **options):
    """A call in bf16 whose tensors begin `offset` elements behind 16 bytes."""
    size = B * T * H * 40
    tensors = [torch.zeros(size + 8, dtype=torch.bfloat16)[offset:][:size] for _ in range(6)]
    given = [x.view(B, T, H, 40) for x in tensors]
    return Call(*given, None, "logit", offsets, **options)


def test_a_first_training_call_compiles_all_of_forward_and_backward_together(compiled):
    call, backend = a_call(), TritonBackend()
    for _ in range(2):
        y, final, saved = backend.forward(call, save=True)
        for dstate in (None, final):
            backend.backward(call, saved, y, dstate)
    assert compiled == [FORWARD + BACKWARD]


def test_without_a_gradient_to_come_forward_is_compiled_alone(compiled):
    backend = TritonBackend()
    for _ in range(2):
        backend.forward(a_call(), save=False)
    assert compiled == [FORWARD]
    backend.forward(a_call(), save=True)
    assert compiled[1:] == [["walk_segments", *BACKWARD]]


def test_a_backward_without_dy_compiles_what_it_lacks_together(compiled):
    call, backend = a_call(), TritonBackend()
    _, final, saved = backend.forward(call, save=True)
    for _ in range(2):
        backend.backward(call, saved, None, final)
    assert compiled[1:] == [BACKWARD]


def test_a_backward_whose_dy_begins_elsewhere_compiles_what_it_lacks_together(compiled):
    call, backend = a_call(), TritonBackend()
    y, _, saved = backend.forward(call, save=True)
    dy = torch.zeros(y.numel() + 8, dtype=y.dtype)[1:][: y.numel()].view(y.shape)
    for _ in range(2):
        backend.backward(call, saved, dy, None)
    assert compiled[1:] == [["rewalk_steps", "step_gradients"]]


@pytest.mark.parametrize(
    ("other", "lacking"),
    [
        (
            functools.partial(a_call, T=2048),
            ["segment_maps", "chain_segments", "gradient_maps"],
        ),
        (functools.partial(a_call, H=plan.FULL_WALKS), ["walk_segments"]),
        (functools.partial(a_call, invariant=True), ["walk_segments"]),
        (
            functools.partial(a_call, offset=1),
            [*FORWARD, "prepare_steps", "rewalk_steps", "step_gradients"],
        ),
        (
            functools.partial(a_call, offsets=torch.tensor([0, 5, 65], dtype=torch.int32)),
            FORWARD + BACKWARD,
        ),
    ],
    ids=["segments", "many walks", "invariant", "elsewhere", "packed"],
)
def test_another_call_of_the_same_sizes_compiles_what_it_lacks_together(other, lacking, compiled):
    backend = TritonBackend()
    backend.forward(a_call(), save=True)
    for _ in range(2):
        call = other()
        y, final, saved = backend.forward(call, save=True)
        backend.backward(call, saved, y, final)
    assert compiled[1:] == [lacking]


def test_the_same_by_offsets_of_another_dtype(compiled):
    backend, offsets = TritonBackend(), torch.tensor([0, 5, 65])
    for given in (offsets, offsets.int(), offsets):
        backend.forward(a_call(offsets=given), save=False)
    assert compiled == [FORWARD, FORWARD]


def test_token_by_token_too_both_directions_are_compiled_together(compiled):
    call, backend = replace(a_call(), decay="log"), TritonBackend()
    y, _, saved = backend.forward(call, save=True)
    backend.backward(call, saved, y, None)
    assert compiled == [["walk_tokens", "walk_tokens_back"]]


def what_triton_compiles_for(target):
    """For a tensor and a number, by Triton's own look at them."""
    backends, compiler, jit = (
        importlib.import_module(f"triton.{x}")
        for x in ("backends.compiler", "compiler", "runtime.jit")
    )

    def kernel(x, n):
        pass

    made = jit.JITFunction(kernel, do_not_specialize=["n"])
    backend = compiler.make_backend(backends.GPUTarget(*target))
    look = jit.create_function_from_signature(made.signature, made.params, backend)
    return lambda x, n: look(x, n)[1]


@pytest.mark.parametrize("target", [("cuda", 90, 32), ("hip", "gfx942", 64)], ids=lambda x: x[0])
def test_what_stands_in_for_an_argument_is_compiled_for_as_it_is(target, monkeypatch):
    triton = pytest.importorskip("triton")
    if type(triton.language.sum).__name__ == "InterpretedFunction":  # it must go on with it
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = what_triton_compiles_for(target)
    x = torch.zeros(16, dtype=torch.bfloat16)
    large = torch.empty(2**31, dtype=torch.uint8, device="meta")
    given = [x, x[1:], x[8:], x.float()[2:], None, torch.zeros(2, dtype=torch.int64), large]
    given += [large[: 2**20], large[8:], torch.empty(2**31 - 1, dtype=torch.uint8, device="meta")]
    several = set()
    for pair in [(x, n) for x in given for n in (0, 1, 16, 2**31 - 1, 2**31)]:
        kinds, large = launch._seen(pair)[0], launch._large(pair)
        expected = seen(*pair)
        assert seen(*map(launch._stand_in, kinds, large)) == expected
        several.add(str(expected))
    assert len(several) >= 14
    part = Part(x, x.data_ptr(), torch.float16, 2, 3)
    assert launch._seen((part,))[0] == launch._seen((part.tensor(),))[0]


@pytest.mark.gpu
def test_a_first_training_call_takes_as_much_memory_as_later_ones(nothing_compiled):
    inputs = [x.cuda() for x in make_inputs(Case(B=4, T=2048, H=16, K=48, V=48), torch.bfloat16)]
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:6]]
    seeds, peaks = [torch.ones_like(x) for x in wkv7(*inputs[:6], backend="torch")], []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = wkv7(*leaves, backend="triton")
        torch.autograd.grad(outputs, leaves, seeds)
        del outputs
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= 1.1 * peaks[1]
