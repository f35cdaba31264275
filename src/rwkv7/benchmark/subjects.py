"""Who is measured: this library's backends, a tight token loop, and other people's kernels.

Each takes a sample in its own layouts and forms, converted before any clock runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.machine import package_version
from rwkv7.state import state_to_fla
from rwkv7.wkv7 import batch_invariant, explain, wkv7, wkv7_step_
from rwkv7.wkv7.contract import DECAY_SCALE, log_decay
from rwkv7.wkv7.registry import backend_names
from rwkv7.wkv7.tolerance import GRADIENTS

from .sample import Sample

BASELINE = "token loop"
FLA_CHUNKS = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample as one subject takes it, ready to run.

    Attributes:
        operator: (r, w, k, v, a, b, state) -> (y, final state).
        inputs: the seven tensors, dfinal in the layout of the state.
        transposed: its states are [K, V].
    """

    operator: Callable[..., tuple[Tensor, Tensor]]
    inputs: list[Tensor]
    dy: Tensor
    dfinal: Tensor
    transposed: bool = False

    def forward(self) -> dict[str, Tensor]:
        """y and the final state, no gradient wanted."""
        with torch.no_grad():
            y, final = self.operator(*self.inputs)
        return self._ours({"y": y, "state": final})

    def training(self) -> dict[str, Tensor]:
        """The same, and the seven gradients of a loss on both."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        y, final = self.operator(*leaves)
        gradients = torch.autograd.grad((y, final), leaves, (self.dy, self.dfinal))
        found = {"y": y.detach(), "state": final.detach()}
        return self._ours(found | dict(zip(GRADIENTS, gradients, strict=True)))

    def _ours(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.transposed:
            return found
        return {name: x.mT if "state" in name else x for name, x in found.items()}


@dataclass(frozen=True, slots=True)
class Subject:
    """One way to compute the operator.

    Attributes:
        refuses: why it cannot take this sample, or None.
        route: how it would run, in a few words.
        prepare: the sample as it takes it.
        steps: as `prepare`, for decoding (T = 1): a function that takes one step in every one of
            the pools it is given, and returns y and the last pool; None where it has no such way.
        form: of the decays it gets, as `wkv7` names them.
        peer: another project's, which this library is compared with.
    """

    name: str
    refuses: Callable[[Sample], str | None]
    route: Callable[[Sample], str]
    prepare: Callable[[Sample], Prepared]
    steps: Callable[[Sample, list[Tensor]], Callable[[], tuple[Tensor, Tensor]]] | None = None
    form: str = "logit"
    peer: bool = False


def token_loop() -> Subject:
    """Two einsums a token and autograd, in float32 (float64 for float64 inputs)."""

    def refuses(sample: Sample) -> str | None:
        return None if sample.cu_seqlens is None else "takes no packed sequences"

    def prepare(sample: Sample) -> Prepared:
        inputs = [*sample.inputs, sample.state]
        return Prepared(einsum_loop, inputs, sample.dy, sample.dfinal)

    return Subject(BASELINE, refuses, lambda _: "two einsums a token", prepare)


def backend(text: str) -> Subject:
    """One of this library's backends by its name, or as it is inside `batch_invariant()` by
    NAME:invariant; ValueError for a name that is not in the table."""
    name, _, how = text.partition(":")
    if name not in backend_names() or text not in (name, f"{name}:invariant"):
        names = ", ".join(backend_names())
        raise ValueError(f"backend: expected one of {names}, or NAME:invariant, found {text!r}")
    mode = batch_invariant if how else contextlib.nullcontext

    def told(sample: Sample) -> tuple[str | None, str | None]:
        with mode():
            found = explain(*sample.inputs, cu_seqlens=sample.cu_seqlens, backend=name)
        return found.route, found.refusals.get(name)

    def prepare(sample: Sample) -> Prepared:
        def operator(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            with mode():
                return wkv7(*inputs, cu_seqlens=sample.cu_seqlens, backend=name)

        inputs = [*sample.inputs, sample.state]
        return Prepared(operator, inputs, sample.dy, sample.dfinal)

    title = f"{name}, batch-invariant" if how else name
    return Subject(title, lambda s: told(s)[1], lambda s: told(s)[0] or "", prepare)


def step() -> Subject:
    """`wkv7_step_`, for decoding; its backend is the library's own choice."""

    def steps(sample: Sample, pools: list[Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        r, w, k, v, a, b = (x[:, 0].contiguous() for x in sample.inputs)

        def run() -> tuple[Tensor, Tensor]:
            for pool in pools:
                y = wkv7_step_(r, w, k, v, a, b, pool)
            return y[:, None], pools[-1]

        return run

    prepare = backend(backend_names()[0]).prepare
    return Subject("wkv7_step_", lambda _: None, lambda _: "in place", prepare, steps)


def fla(chunk: int) -> Subject:
    """flash-linear-attention's chunk_rwkv7 with chunks of that size, as fast as it can be asked.

    It gets log decays in the dtype of the inputs, as its own model makes them, their lower bound
    (which allows tensor cores within a chunk, and chunk 64), and the offsets on the CPU too.
    Decoding is its fused_recurrent_rwkv7. ValueError where it is not installed.

    Its kernels are tuned by Triton's autotuner on the first call of a head size, dtype and chunk,
    for some 100 s. The choice is kept in Triton's cache, so that a second
    process with the same TRITON_CACHE_DIR tunes nothing; the folders with *.autotune.json in it
    are enough to carry it to a machine with the same card and versions. B, T and, but for one
    kernel, H are no part of the key: what the first shape chose serves the others.
    """
    if chunk not in FLA_CHUNKS:
        raise ValueError(f"chunk: expected one of {', '.join(map(str, FLA_CHUNKS))}, found {chunk}")
    if importlib.util.find_spec("fla") is None:
        raise ValueError("against: fla is not installed; pip install 'rwkv7[peers]' brings it")
    version = package_version("fla-core") or package_version("flash-linear-attention")

    def refuses(sample: Sample) -> str | None:
        if sample.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "its kernels need a GPU"
        if sample.dtype not in (torch.bfloat16, torch.float16):
            return f"its chunked kernels do not support {sample.dtype}"
        return None

    def prepare(sample: Sample) -> Prepared:
        from fla.ops.rwkv7 import chunk_rwkv7

        offsets = sample.cu_seqlens
        function = functools.partial(
            chunk_rwkv7,
            scale=1.0,
            output_final_state=True,
            chunk_size=chunk,
            lower_bound=-DECAY_SCALE,
            cu_seqlens=offsets,
            cu_seqlens_cpu=None if offsets is None else offsets.cpu(),
        )

        def operator(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            y, final = function(*inputs[:6], initial_state=inputs[6])
            return y, final

        inputs = [*_with_log_decays(sample), state_to_fla(sample.state)]
        dfinal = state_to_fla(sample.dfinal)
        return Prepared(operator, inputs, sample.dy, dfinal, transposed=True)

    name = f"fla-core {version}, chunk {chunk}"
    route = "chunk_rwkv7, bounded decay; decoding: fused_recurrent_rwkv7"
    return Subject(name, refuses, lambda _: route, prepare, _fla_steps, "log_bounded", peer=True)


def _fla_steps(sample: Sample, pools: list[Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
    from fla.ops.rwkv7 import fused_recurrent_rwkv7

    function = functools.partial(fused_recurrent_rwkv7, scale=1.0, output_final_state=True)
    inputs = _with_log_decays(sample)
    turned = [state_to_fla(pool) for pool in pools]

    def run() -> tuple[Tensor, Tensor]:
        for state in turned:
            y, final = function(*inputs, initial_state=state)
        return y, final.mT

    return run


def _with_log_decays(sample: Sample) -> list[Tensor]:
    r, _, k, v, a, b = sample.inputs
    return [r, sample.decays("log_bounded"), k, v, a, b]


def einsum_loop(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final state [B, H, V, K], by two einsums a token; `w` are logits."""
    dtype, S = state.dtype, state
    d = log_decay(w, "logit", dtype).exp()
    r, k, wide_v, a, b = (x.to(dtype) for x in (r, k, v, a, b))
    ys = []
    for t in range(r.shape[1]):
        Sa = torch.einsum("bhvk,bhk->bhv", S, a[:, t])
        S = S * d[:, t, :, None, :] + Sa[..., None] * b[:, t, :, None, :]
        S = S + wide_v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append(torch.einsum("bhvk,bhk->bhv", S, r[:, t]))
    return torch.stack(ys, 1).to(v.dtype), S
