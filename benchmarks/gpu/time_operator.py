"""Times the operator on a GPU: forward, forward+backward, the decoding step, peak memory, errors.

    python benchmarks/gpu/time_operator.py OUT.json [--against-fla] [--shapes 8x4096x64x64,...]

bf16 inputs with a model's distribution, a non-zero fp32 state, gradients through y and the final
state. With --against-fla, fla-core's chunk_rwkv7 (its decay bound given) runs on the same inputs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

import rwkv7
from rwkv7.wkv7.contract import log_decay

SHAPES = "8x4096x64x64,8x4096x12x64,1x8192x32x64,1x65536x32x64"
Inputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]


def make(B: int, T: int, H: int, N: int, same_key: bool = False) -> Inputs:
    """r, w, k, v, a, b; state; dy; dstate. same_key: a repeated token, iclr 0.98, decay near 1."""
    g = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    unit = torch.nn.functional.normalize
    r, k, v, dy = (noise(B, T, H, N) for _ in range(4))
    key, rate = unit(noise(B, T, H, N), dim=-1), noise(B, T, H, N).sigmoid()
    w = noise(B, T, H, N).sigmoid() * 6 - 6
    if same_key:
        key = unit(unit(noise(B, 1, H, N), dim=-1) + 0.01 / math.sqrt(N) * key, dim=-1)
        k, rate, w = key, torch.full_like(rate, 0.98), torch.full_like(w, -8.0)
    inputs = [x.bfloat16() for x in (r, w, k, v, -key, key * rate)]
    return inputs, noise(B, H, N, N), dy.bfloat16(), noise(B, H, N, N)


def ours(inputs: list[torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's operator, default form."""
    return rwkv7.wkv7(*inputs, state, backend="triton")


def fla(inputs: list[torch.Tensor], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fla-core on log decays, with its [K, V] states; chunk 64 by its own choice."""
    from fla.ops.rwkv7 import chunk_rwkv7

    r, w, k, v, a, b = inputs
    y, final = chunk_rwkv7(
        r, w, k, v, a, b, initial_state=state, output_final_state=True, lower_bound=-0.6066
    )
    return y, final


def milliseconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median over five batches of `repeats` calls in a row, after warm-up."""
    for _ in range(2):
        run()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / repeats)
    return sorted(times)[2]


def both_ways(operator: Callable[..., Any], data: Inputs) -> tuple[torch.Tensor, ...]:
    """(y, state, gradients of the six inputs and of the state)."""
    inputs, state, dy, dstate = data
    leaves = [x.detach().requires_grad_() for x in (*inputs, state)]
    y, final = operator(leaves[:6], leaves[6])
    return (y, final, *torch.autograd.grad((y, final), leaves, (dy, dstate)))


def measure(operator: Callable[..., Any], data: Inputs) -> dict[str, float]:
    """First call, forward, forward+backward and peak memory of one operator on one shape."""
    started = time.perf_counter()
    both_ways(operator, data)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ways(operator, data)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = milliseconds(lambda: operator(data[0], data[1]))
    return {
        "first_call_s": first,
        "forward_ms": forward,
        "forward_backward_ms": milliseconds(lambda: both_ways(operator, data), 3),
        "peak_gb": peak / 1e9,
    }


def logged(data: Inputs) -> Inputs:
    """The same inputs for fla-core: w as log decays, states transposed."""
    inputs, state, dy, dstate = data
    w = log_decay(inputs[1], "logit", torch.float32)
    turned = [s.transpose(-1, -2).contiguous() for s in (state, dstate)]
    return [inputs[0], w, *inputs[2:]], turned[0], dy, turned[1]


def errors(against_fla: bool, same_key: bool) -> dict[str, dict[str, float]]:
    """Relative errors against the recurrence in fp64 on the same rounded inputs, 2x256x4x64."""
    data = make(2, 256, 4, 64, same_key)
    exact = ([x.double() for x in data[0]], *(x.double() for x in data[1:]))
    reference = both_ways(lambda x, s: rwkv7.wkv7(*x, s, backend="reference"), exact)
    found = {"ours": both_ways(ours, data)}
    if against_fla:
        y, final, *grads = both_ways(fla, logged(data))
        found["fla"] = (y, final.mT, *grads[:1], grads[1], *grads[2:6], grads[6].mT)
    names = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate")
    table = {}
    for who, tensors in found.items():
        pairs = zip(names, tensors, reference, strict=True)
        table[who] = {n: float((x.double() - e).norm() / e.norm()) for n, x, e in pairs}
    if against_fla:
        del table["fla"]["dw"]  # of the log decay there, of the logit here
    return table


def decoding(B: int, H: int = 64, N: int = 64) -> dict[str, float]:
    """One token for B sequences: milliseconds, and the share of a copy's speed on the state."""
    inputs, state, _, _ = make(B, 1, H, N)
    token = [x[:, 0].contiguous() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        rwkv7.wkv7_step_(*token, state)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            rwkv7.wkv7_step_(*token, state)
        step = milliseconds(graph.replay)
        other = torch.empty_like(state)
        copy = milliseconds(lambda: other.copy_(state))
    return {"batch": B, "step_ms": step, "copy_ms": copy, "share_of_copy": copy / step}


def main() -> None:
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against-fla", action="store_true")
    parser.add_argument("--shapes", default=SHAPES)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": [],
    }
    result["decoding"] = [decoding(B) for B in (1, 8, 64, 256)]
    print(result["decoding"], flush=True)
    for shape in options.shapes.split(","):
        B, T, H, N = (int(x) for x in shape.split("x"))
        data = make(B, T, H, N)
        row: dict[str, Any] = {"shape": shape, "ours": measure(ours, data)}
        print(shape, row["ours"], flush=True)
        if options.against_fla:
            row["fla"] = measure(fla, logged(data))
            print(shape, row["fla"], flush=True)
        result["rows"].append(row)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        del data
    for name, same_key in (("random", False), ("same_key", True)):
        result["errors_" + name] = errors(options.against_fla, same_key)
        print(name, result["errors_" + name], flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
