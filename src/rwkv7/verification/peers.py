"""Other people's RWKV-7, held to the same recurrence: flash-linear-attention and `rwkv`.

Their kernels and their model run as they come; only layouts are converted, at this edge.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rwkv7.machine import package_version
from rwkv7.state import state_from_fla, state_to_fla
from rwkv7.wkv7.contract import DECAY_SCALE

from .checks import Check, Refusal, Row, operator_check
from .problem import STATES, Problem, Sizes
from .untuned import untuned

__all__ = ["PEERS", "peer_checks"]


def peer_checks(
    names: list[str], sizes: Sizes, devices: list[torch.device]
) -> tuple[list[Check], list[Refusal]]:
    """The checks of the named peers, and which of them cannot run on these devices.

    ValueError for a name that is not in PEERS, and for a peer that is not installed.
    """
    checks: list[Check] = []
    refusals: list[Refusal] = []
    for name in names:
        if name not in PEERS:
            raise ValueError(f"against: expected {' or '.join(PEERS)}, found {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"against: {name} is not installed; pip install 'rwkv7[peers]' brings it"
            )
        more, refused = PEERS[name](sizes, devices)
        checks += more
        refusals += refused
    return checks, refusals


def _fla(sizes: Sizes, devices: list[torch.device]) -> tuple[list[Check], list[Refusal]]:
    device = next((device for device in devices if device.type == "cuda"), None)
    if device is None:
        return [], [Refusal("fla", "its kernels need a GPU, and there is none here")]
    try:
        from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7
    except ImportError as error:
        return [], [Refusal("fla", f"it cannot be imported ({error})")]
    chunk = functools.partial(chunk_rwkv7, scale=1.0, output_final_state=True)
    bounded = functools.partial(chunk, lower_bound=-DECAY_SCALE)
    step = functools.partial(fused_recurrent_rwkv7, scale=1.0)
    version = package_version("fla-core") or package_version("flash-linear-attention")
    checks = []
    # float32 is left out: their chunked kernels warn that they do not support it.
    for dtype in (torch.bfloat16, torch.float16):
        problem = Problem(sizes, dtype)
        for name, function, gradients in (
            (f"fla {version} chunk_rwkv7", chunk, True),
            (f"fla {version} chunk_rwkv7, lower_bound", bounded, True),
            (f"fla {version} fused_recurrent_rwkv7", step, False),
        ):
            operator = functools.partial(_by_fla, function)
            checks += [
                operator_check(name, problem, kind, device, operator, gradients) for kind in STATES
            ]
    return [replace(check, run=functools.partial(_run_untuned, check)) for check in checks], []


def _run_untuned(check: Check) -> list[Row]:
    with untuned("fla"):
        return [replace(row, peer=True) for row in check.run()]


def _by_fla(
    function: Callable[..., tuple[Tensor, Tensor]],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # Their w is the log decay. In float32, so that the error measured is theirs.
    log_decay = -DECAY_SCALE * w.float().sigmoid()
    initial = None if state is None else state_to_fla(state)
    y, final = function(r, log_decay, k, v, a, b, initial_state=initial)
    return y, state_from_fla(final)


def _rwkv(sizes: Sizes, devices: list[torch.device]) -> tuple[list[Check], list[Refusal]]:
    from .model import model_check

    return [model_check()], []


PEERS: dict[str, Callable[[Sizes, list[torch.device]], tuple[list[Check], list[Refusal]]]] = {
    "fla": _fla,
    "rwkv": _rwkv,
}
