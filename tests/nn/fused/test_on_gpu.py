"""The fused neighbours on a GPU, as compiled: precision in every dtype, sizes, determinism."""

import pytest
import torch
from nn.fused.neighbours import drawn, errors, keys, losses, outcome, output, relu, shift, value

from rwkv7 import RWKV7, ModelConfig, ModelState
from rwkv7.nn.fused import use_fused

pytestmark = pytest.mark.gpu

CUDA = "cuda"
LENGTHS = [0, 1, 700, 0, 63, 284, 0]
PROBLEMS = {
    "shift": lambda normal: shift(normal, B=3, T=333, C=768, carried=True),
    "shift one": lambda normal: shift(normal, B=3, T=333, C=640, mixes=1),
    "shift packed": lambda normal: shift(
        normal, T=sum(LENGTHS), C=320, lengths=LENGTHS, carried=True
    ),
    "shift long": lambda normal: shift(normal, T=70_000, C=64, lengths=[1, 65_536, 4_463]),
    "shift without a sum": lambda normal: shift(normal, B=3, T=1366, C=2048, added=False),
    "shift wide": lambda normal: shift(normal, B=1, T=300, C=5120, mixes=1),
    "keys": lambda normal: keys(normal, B=3, T=333, H=5, N=64),
    "keys 128": lambda normal: keys(normal, B=1, T=2500, H=2, N=128),
    "output": lambda normal: output(normal, B=3, T=333, H=5, N=64),
    "output 48": lambda normal: output(normal, B=1, T=2500, H=2, N=48),
    "value": lambda normal: value(normal, B=3, T=333, H=5, N=64),
    "value 48": lambda normal: value(normal, B=1, T=2500, H=2, N=48),
    "relu": lambda normal: relu(normal, shape=(3, 333, 1000)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_less_precise_than_plain_torch(name, dtype):
    problem = PROBLEMS[name](drawn(dtype, CUDA))
    fused, plain = (errors(problem, dtype, fused=fused) for fused in (True, False))
    assert max(fused) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    for x, y in zip(fused, plain, strict=True):
        assert x < 1.1 * y + 1e-6


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_bits_again(name):
    problem = PROBLEMS[name](drawn(torch.bfloat16, CUDA))
    first, second = (outcome(problem, torch.bfloat16, fused=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 50, 9001, 65536])
def test_loss_of_logits_no_less_precise_than_plain_torch(V, dtype):
    logits = drawn(dtype, CUDA)(300, V, scale=4.0)
    targets = torch.randint(V, (300,), device=CUDA)
    targets[::7] = -100
    exact = losses(logits, targets, torch.float64, fused=False)
    fused, plain = (losses(logits, targets, dtype, fused=fused) for fused in (True, False))
    again = losses(logits, targets, dtype, fused=True)
    for x, y, z, e in zip(fused, plain, again, exact, strict=True):
        assert torch.equal(x, z)
        size = e.norm().clamp(min=1e-30)
        mine, other = (float((part.double() - e).norm() / size) for part in (x, y))
        assert mine < 1.1 * other + 1e-6


def test_they_run_by_themselves():
    problem = PROBLEMS["shift"](drawn(torch.float32, CUDA))
    leaves = [x.float().requires_grad_() for x in problem.tensors]
    assert "norm_mix" in problem.function(*leaves)[0].grad_fn.name()
    assert "norm_mix" not in problem.function(*map(torch.Tensor.double, leaves))[0].grad_fn.name()
    with use_fused(False):
        assert "norm_mix" not in problem.function(*leaves)[0].grad_fn.name()


def test_new_lengths_compile_nothing():
    from rwkv7.nn.fused.kernels.heads import gated_output as kernel
    from rwkv7.nn.fused.kernels.shift import norm_mix_back

    def run(*shapes):
        for B, T in shapes:
            normal = drawn(torch.bfloat16, CUDA)
            for problem in (
                shift(normal, B=B, T=T, C=64, carried=True),
                output(normal, B=B, T=T, H=1, N=64),
            ):
                outcome(problem, torch.bfloat16, fused=True)
        return [sum(len(held[0]) for held in k.device_caches.values()) for k in kernels]

    kernels = (kernel, norm_mix_back)
    before = run((2, 37))
    assert run((1, 1), (16, 16), (3, 2048), (5, 4097)) == before


def test_more_than_two_thousand_million_numbers():
    """Offsets beyond 2³¹: the last rows are as those of a small call. 15 GB."""
    C, rows = 4096, 2**19 + 8
    x = torch.zeros(1, rows, C, dtype=torch.bfloat16, device=CUDA)
    tail = torch.randn(1, 8, C, device=CUDA).bfloat16()
    x[:, -8:] = tail
    m, weight = torch.rand(2, C, device=CUDA).bfloat16()
    vectors = m, weight, torch.zeros_like(m)
    problem = shift(drawn(torch.bfloat16, CUDA), T=1, C=C, mixes=1, added=False)
    with use_fused(True), torch.no_grad():
        big, last = problem.function(x, *vectors)
        small, last_of_small = problem.function(tail, *vectors)
        assert torch.equal(big[:, -7:], small[:, 1:]) and torch.equal(last, last_of_small)
        assert not big[:, :-8].any()
        del big
        squares = relu(drawn(torch.bfloat16, CUDA)).function(x)[0]
        assert torch.equal(squares[:, -8:], relu(drawn(torch.bfloat16, CUDA)).function(tail)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_cheap_is_computed_again_in_half_the_memory(packed):
    config = ModelConfig.from_sizes(vocab_size=97, width=256, layers=4)
    model = RWKV7(config, torch.float32, CUDA)
    tokens = torch.randint(97, (1, 4096), device=CUDA)
    offsets = torch.tensor([0, 5, 2000, 4096], device=CUDA) if packed else None

    def run(recompute):
        """The gradients, and the bytes that wait for the backward pass."""
        model.recompute = recompute
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        with torch.autocast(CUDA, torch.bfloat16):
            features, _ = model.hidden(tokens, cu_seqlens=offsets)
        kept = torch.cuda.memory_allocated() - before
        features.square().mean().backward()
        return {n: x.grad for n, x in model.named_parameters() if x.grad is not None}, kept

    run("nothing")  # compiles
    (plain, whole), (found, kept) = run("nothing"), run("cheap")
    repeated, _ = run("nothing")
    # What torch itself gives the same twice, computing again gives too.
    same = [name for name, x in plain.items() if torch.equal(x, repeated[name])]
    differ = [name for name in same if not torch.equal(plain[name], found[name])]
    assert not differ and len(same) > 100, (differ, plain.keys() - same)
    assert kept < 0.6 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [[3, 0, -1, 2], [3]], ids=["rows", "one"])
@pytest.mark.parametrize(("head_size", "width"), [(64, 256), (128, 256), (64, 2560)])
def test_steps_of_a_model_in_a_cuda_graph(head_size, width, dtype, chosen):
    config = ModelConfig.from_sizes(vocab_size=97, width=width, layers=3, head_size=head_size)
    exact = RWKV7(config, torch.float64, CUDA)
    with torch.no_grad():
        for x in exact.parameters():
            x.add_(torch.randn_like(x), alpha=0.5 * x.shape[-1] ** -0.5)
    exact = exact.to(dtype).double()
    model = RWKV7(config, dtype, CUDA)
    model.load_state_dict(exact.state_dict())
    tokens = torch.randint(97, (5, len(chosen)), device=CUDA)
    slots = torch.tensor(chosen, device=CUDA)
    used = slots >= 0
    pools = [ModelState.zeros(config, 5, kind, CUDA) for kind in (torch.float64, dtype, dtype)]
    token = tokens[0].clone()
    model.step_(token, ModelState.zeros(config, 5, dtype, CUDA), slots)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model.step_(token, pools[1], slots)
    steps = []
    for row in tokens:
        expected = exact.step_(row, pools[0], slots)
        with use_fused(False):
            plain = model.step_(row, pools[2], slots)
        token.copy_(row)
        graph.replay()
        steps.append(torch.stack([expected, logits.double(), plain.double()])[:, used])
    # All steps together: of one with few numbers, chance alone may make either the better one.
    expected, fused, plain = torch.stack(steps, 1)
    assert (fused - expected).norm() < 1.2 * (plain - expected).norm() + 1e-6 * expected.norm()
