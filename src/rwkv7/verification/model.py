"""The whole model beside the `rwkv` package from PyPI, on a small random checkpoint.

Both read the same file and get the same states; both are held to our model in float64 on the
token loop. The package runs in a process of its own, because it reads its settings from the
environment when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rwkv7.config import ModelConfig
from rwkv7.machine import package_version
from rwkv7.nn import RWKV7
from rwkv7.state import LayerState, ModelState
from rwkv7.weights import save_model
from rwkv7.wkv7.tolerance import BOUNDS, Measure, relative_error

from .checks import Check, Row
from .problem import STATES

RESULTS = ("logits", "wkv", "time_shift", "channel_shift")
_TOKENS = 24
_MODES = {"sequence": _TOKENS, "token by token": 1}


def model_check() -> Check:
    """One check that gives the rows of both models, all states, whole and token by token."""
    return Check("rwkv", "cpu", _rows)


def random_model(seed: int = 0) -> RWKV7:
    """A small model in which every parameter matters.

    Never the official start for this: there each layer is the identity, and nothing is tested.
    """
    config = ModelConfig(
        vocab_size=256,
        width=128,
        layers=2,
        decay_rank=32,
        iclr_rank=32,
        value_rank=32,
        gate_rank=32,
    )
    model = RWKV7(config, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".w0"):
                parameter.copy_(-2.75 + 3.25 * noise.clamp(-1, 1))
            elif ".ln" in name or name.startswith("ln_out"):
                parameter.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (1.0 if name == "emb.weight" else 0.1))
    return model.eval()


def _rows() -> list[Row]:
    model = random_model()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(256, (_TOKENS,), generator=generator)
    zero = ModelState.zeros(model.config)
    random = ModelState(
        tuple(
            LayerState(*(torch.randn(x.shape, generator=generator) for x in layer))
            for layer in zero.layers
        )
    )
    states = {"none": None, "zero": zero, "random": random}
    with torch.no_grad():
        exact = RWKV7(model.config, torch.float64, "cpu")
        exact.load_state_dict(model.state_dict())
        right = {kind: _run(exact, tokens, states[kind], _TOKENS) for kind in STATES}
        ours = {
            (mode, kind): _run(model, tokens, states[kind], size)
            for mode, size in _MODES.items()
            for kind in STATES
        }
    theirs = _run_package(model, tokens, states)
    version = package_version("rwkv")
    rows = []
    for subject, results in (("rwkv7.RWKV7", ours), (f"rwkv {version}", theirs)):
        for (mode, kind), found in results.items():
            measures = {
                name: Measure(
                    relative_error(found[name], right[kind][name]), BOUNDS[torch.float32].y
                )
                for name in RESULTS
            }
            name = f"{subject}, {mode}"
            rows.append(Row(name, "cpu", torch.float32, kind, measures, peer=results is theirs))
    return rows


def _run(model: RWKV7, tokens: Tensor, state: ModelState | None, size: int) -> dict[str, Tensor]:
    """logits [T, vocabulary] and the final state, reading `size` tokens a call."""
    backend = None
    if model.dtype == torch.float64:
        backend = "reference"
        state = None if state is None else state.to(dtype=torch.float64)
    logits = []
    for piece in tokens[None].split(size, dim=1):
        out, state = model(piece, state, backend=backend)
        logits.append(out[0])
    assert state is not None
    return {"logits": torch.cat(logits), **_flat(state)}


def _flat(state: ModelState) -> dict[str, Tensor]:
    """The layers' states stacked: wkv [L, H, V, K], both shifts [L, C]."""
    return {
        name: torch.cat([getattr(layer, name) for layer in state.layers])
        for name in LayerState._fields
    }


def _run_package(
    model: RWKV7, tokens: Tensor, states: dict[str, ModelState | None]
) -> dict[tuple[str, str], dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_model(model, path / "model.pth")
        given = {"tokens": tokens}
        for kind, state in states.items():
            if state is not None:
                given |= {f"{kind}.{name}": x for name, x in _flat(state).items()}
        save_file(given, path / "given.safetensors")
        # No kernel is compiled, by TorchScript or nvcc: neither changes what is computed.
        settings = {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
        ended = subprocess.run(
            [sys.executable, "-m", f"{__package__}.rwkv_process", folder],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"against: the rwkv package failed: {last}")
        found = load_file(path / "found.safetensors")
    return {
        (mode, kind): {name: found[f"{mode}.{kind}.{name}"] for name in RESULTS}
        for mode in _MODES
        for kind in STATES
    }
