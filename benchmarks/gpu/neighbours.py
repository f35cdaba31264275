"""What stands beside the recurrence, fused against plain torch: time, memory and error of each.

    python benchmarks/gpu/neighbours.py OUT [--sizes 8x4096x768,8x4096x4096] [--limit 570]

A neighbour's bytes are its inputs, outputs and gradients, each once; their share is of the speed
at which the card copies. `bfloat16` has all in bf16, `autocast` what a model with fp32 weights
makes of it, with the casts before the next product. Errors are against float64. `step` is a time
mix's whole step for B sequences, projections included, in bf16 as a CUDA graph.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv7 import RWKV7, ModelConfig, ModelState
from rwkv7.benchmark import clock
from rwkv7.benchmark.record import Record
from rwkv7.machine import device_called
from rwkv7.nn import TimeMix
from rwkv7.nn.fused import gated_output, key_operands, shifted_mixes, squared_relu, use_fused
from rwkv7.nn.token_shift import slots_of
from rwkv7.wkv7 import unchecked

HEAD_SIZE = 64
JUDGED = 512  # tokens of one sequence whose errors are taken


class Neighbour(NamedTuple):
    """A function of activations and parameters, and their shapes."""

    function: Callable[..., tuple[Tensor, ...]]
    activations: tuple[tuple[int, ...], ...]
    parameters: tuple[tuple[int, ...], ...]
    wide: int = 0  # how many activations, the first, are float32 under autocast: the residual


def main() -> None:
    """Measures every neighbour at every size, the smaller sizes first."""
    parser = argparse.ArgumentParser(description="Fused neighbours of the recurrence.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default="8x4096x768,8x4096x4096", help="BxTxC, ...")
    parser.add_argument("--limit", type=float, default=570, help="seconds for all of it")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = device_called(options.device)
    record = Record(options.out, "neighbours", device, about=__doc__, limit=options.limit)
    copied = _copy_speed(device)
    record.keep({"part": "copy", "bytes_per_s": copied})
    for size in options.sizes.split(","):
        width = int(size.split("x")[2])
        for batch in (1, 64, 1024):
            measure = functools.partial(_step, width, batch, device)
            record.part(f"step, {batch} sequences, C = {width}", measure, needs=10)
        B, T, C = (int(number) for number in size.split("x"))
        for name, neighbour in _neighbours(B, T, C).items():
            for mode in ("bfloat16", "autocast"):
                measure = functools.partial(_measured, neighbour, mode, B, device, copied)
                record.part(f"{name}, {size}, {mode}", measure, needs=10)


def _neighbours(B: int, T: int, C: int) -> dict[str, Neighbour]:
    H, N = C // HEAD_SIZE, HEAD_SIZE
    token, heads, channels = (B, T, C), (B, T, H, N), (C,)

    def shift(x: Tensor, added: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        *mixes, weight, bias = vectors
        norm = torch.nn.LayerNorm(C, device="meta")
        del norm.weight, norm.bias  # to take those with gradients, as they are
        norm.weight, norm.bias = weight, bias
        found = shifted_mixes(x, added, norm, None, None, tuple(mixes))
        return (*found.mixed, found.x)

    def output(*tensors: Tensor) -> tuple[Tensor, ...]:
        return (gated_output(*tensors, 1e-5 * N),)

    return {
        "shift, six mixes": Neighbour(shift, (token,) * 2, (channels,) * 8, wide=1),
        "shift, one mix": Neighbour(shift, (token,) * 2, (channels,) * 3, wide=1),
        "keys": Neighbour(lambda *x: key_operands(*x, H), (token,) * 3, (channels,) * 4),
        "output": Neighbour(output, (*(heads,) * 4, token), ((H, N), channels, channels)),
        "squared relu": Neighbour(lambda x: (squared_relu(x),), ((B, T, 4 * C),), ()),
    }


def _measured(
    neighbour: Neighbour, mode: str, B: int, device: torch.device, copied: float
) -> dict[str, Any]:
    """Both sides' milliseconds and shares, peak memory beyond the inputs, and errors."""
    autocast = mode == "autocast"
    generator = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...], wide: bool) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device)
        return (x if wide else x.bfloat16()).requires_grad_()

    tensors = [
        normal(shape, autocast and i < neighbour.wide)
        for i, shape in enumerate(neighbour.activations)
    ]
    tensors += [normal(shape, autocast) for shape in neighbour.parameters]
    count = len(neighbour.activations)
    found: dict[str, Any] = {}
    for side, fused in (("fused", True), ("plain", False)):
        with use_fused(fused):
            run = functools.partial(_outputs, neighbour.function, tensors, autocast)
            seeds = [torch.randn_like(y) for y in run()]
            train = functools.partial(_gradients, run, tensors, seeds)
            first = clock.first_call(train, device)
            with torch.no_grad():
                forward = clock.seconds(run, device)
            training = clock.seconds(train, device)
            found[side] = {
                "first_call_s": first,
                "forward_ms": forward * 1e3,
                "training_ms": training * 1e3,
                "peak_mib": clock.peak_mib(train, device),
                "errors": _errors(neighbour.function, tensors, count, autocast),
            }
            inputs, outputs = _bytes(tensors), _bytes(seeds)
            found[side]["forward_share"] = (inputs + outputs) / forward / copied
            # Going back reads inputs and the outputs' gradients and writes the inputs'.
            found[side]["training_share"] = (3 * inputs + 2 * outputs) / training / copied
    for what in ("forward", "training"):
        found[f"{what}_gain"] = found["plain"][f"{what}_ms"] / found["fused"][f"{what}_ms"]
    return found


def _step(width: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Microseconds of one step of a layer's time mix, and the largest difference of both sides."""
    config = ModelConfig.from_sizes(vocab_size=2, width=width, layers=2, head_size=HEAD_SIZE)
    model = RWKV7(config, torch.bfloat16, device)
    layer: TimeMix = model.blocks[1].att  # type: ignore[assignment, union-attr]
    rows = torch.arange(batch, device=device)
    slots = slots_of(rows, rows, batch + 1)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for x in layer.parameters():
            x.normal_(generator=generator).mul_(x.shape[-1] ** -0.5 if x.dim() > 1 else 0.5)
        x = torch.randn(batch, 1, width, generator=generator, device=device).bfloat16()
        found: dict[str, Any] = {}
        outputs = []
        for side, fused in (("fused", True), ("plain", False)):
            pool = ModelState.zeros(config, batch + 1, torch.bfloat16, device).layers[1]
            with use_fused(fused), unchecked():
                run = functools.partial(layer.step_, x, x, pool.time_shift, pool.wkv, slots)
                run()
                outputs.append(run()[0].double())
                found[f"{side}_us"] = clock.seconds(_graphed(run, device), device) * 1e6
    found["gain"] = found["plain_us"] / found["fused_us"]
    found["difference"] = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
    return found


def _graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return run
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _outputs(
    function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], autocast: bool
) -> list[Tensor]:
    mode: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if autocast:
        mode = torch.autocast(tensors[0].device.type, torch.bfloat16)
    with mode:
        outputs = function(*tensors)
    return [y.bfloat16() for y in outputs] if autocast else list(outputs)


def _gradients(
    run: Callable[[], list[Tensor]], tensors: list[Tensor], seeds: list[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(), tensors, seeds)


def _errors(
    function: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor], count: int, autocast: bool
) -> list[float]:
    """‖x - exact‖ / ‖exact‖ of the outputs and the gradients, on the first sequence's beginning."""
    part = [x[:1, :JUDGED] for x in tensors[:count]] + tensors[count:]
    results = []
    for exact in (False, True):
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in part]
        outputs = _outputs(function, leaves, autocast) if not exact else list(function(*leaves))
        generator = torch.Generator(outputs[0].device).manual_seed(1)
        seeds = [
            torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype)
            for y in outputs
        ]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, seeds)])
    return [
        float((x.detach().double() - e.detach()).norm() / e.detach().norm())
        for x, e in zip(*results, strict=True)
    ]


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _copy_speed(device: torch.device) -> float:
    """Bytes read and written a second when the device copies a large tensor."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * _bytes([source]) / clock.seconds(lambda: target.copy_(source), device)


if __name__ == "__main__":
    main()
