"""`rwkv7 doctor`: what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .terminal import check_together

# What each optional package is for.
_EXTRAS = {
    "triton": "GPU kernels (comes with torch where there are any)",
    "cuda-bindings": "backend cuda (comes with torch for CUDA 13): pip install 'rwkv7[cuda]'",
    "pyrwkv-tokenizer": "the World tokenizer: pip install 'rwkv7[world]'",
    "pyarrow": "Parquet and Arrow files: pip install 'rwkv7[data]'",
    "tokenizers": "tokenizer.json files: pip install 'rwkv7[tokenizers]'",
    "peft": "train --tune lora: pip install 'rwkv7[peft]'",
    "lm-eval": "eval --harness: pip install 'rwkv7[harness]'",
    "tensorboard": "train --tensorboard: pip install 'rwkv7[tensorboard]'",
    "rwkv": "verify --against rwkv: pip install 'rwkv7[peers]'",
    "fla-core": "verify --against fla: pip install 'rwkv7[peers]'",
}

_SIZES = {"slots": 16, "max_prefill_tokens": 2048}  # of an engine, where nobody said


def doctor(
    model: Annotated[
        Path | None, typer.Option(help="Say only what an engine on this checkpoint would take.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="With --model: texts that run at once. Default 16.")
    ] = None,
    max_prefill_tokens: Annotated[
        int | None,
        typer.Option(help="With --model: tokens of prompts read between two steps. Default 2048."),
    ] = None,
) -> None:
    """Say what this machine can run: devices, backends with reasons, versions, caches.

    With --model: the memory that an inference engine takes at its start.
    """
    from rwkv7.machine import best_device, describe

    console = Console(highlight=False)
    sizes = {"slots": slots, "max_prefill_tokens": max_prefill_tokens}
    if model is not None:
        given = {name: size for name, size in sizes.items() if size is not None}
        _budget(console, model, **(_SIZES | given))
        return
    check_together("--model", model, sizes)
    _list(console, "Machine", {name: str(value) for name, value in describe().items()})
    _devices(console)
    for device in dict.fromkeys(("cpu", best_device().type)):
        _backends(console, device)
    _optional(console)
    _compiled(console)
    _caches(console)


def _budget(console: Console, path: Path, slots: int, max_prefill_tokens: int) -> None:
    from rwkv7.engine import memory_budget
    from rwkv7.weights import load_model

    model = load_model(path, device="meta")  # sizes alone: no weight is read
    budget = memory_budget(model.config, slots, model.dtype, max_prefill_tokens)
    dtype = str(model.dtype).removeprefix("torch.")
    lines = {
        f"weights, {dtype}": _mib(budget.weights),
        f"states, {slots} slots": f"{_mib(budget.states)} ({_mib(budget.state)} each)",
        "a step's temporaries": f"at most {_mib(budget.working)}",
        "together": _mib(budget.total),
    }
    _list(console, f"Memory of an engine on {path}", lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _list(console: Console, title: str, lines: dict[str, str]) -> None:
    console.print(Text(title, style="bold"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, value in lines.items():
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)


def _devices(console: Console) -> None:
    import torch

    from rwkv7.machine import best_device, device_name

    lines = {"cpu": device_name(torch.device("cpu"))}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        lines[f"cuda:{index}"] = f"{card.name}, {memory}, sm_{card.major}{card.minor}"
    if torch.backends.mps.is_available():
        lines["mps"] = "Apple GPU (no float64: results are checked on the CPU)"
    if torch.version.cuda is None and torch.version.hip is None:
        lines["no cuda"] = f"torch {torch.__version__} is built without it"
    elif not torch.cuda.is_available():
        lines["no cuda"] = "torch is built for it, but no card or driver is found"
    lines["default"] = f"{best_device()} (generate and bench take it unless --device is given)"
    _list(console, "Devices", lines)


def _backends(console: Console, device: str) -> None:
    import torch

    from rwkv7.wkv7 import explain

    console.print(Text(f"Backends of the operator on {device}", style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 2))
    for name in ("inputs", "backend", "", "route, or why not"):
        table.add_column(name, header_style="dim")
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    if device == "mps":
        dtypes.remove(torch.float64)
    for dtype in dtypes:
        x = torch.zeros(1, 64, 2, 64, dtype=dtype, device=device)
        found = explain(x, x, x, x, x, x)
        label = str(dtype).removeprefix("torch.")
        if found.backend is not None:
            table.add_row(label, found.backend, Text("runs", style="green"), found.route)
        for name, reason in found.refusals.items():
            # A backend that only stands behind another can be had by its name.
            able = explain(x, x, x, x, x, x, backend=name).backend is not None
            mark = Text("by name", style="dim") if able else Text("no", style="yellow")
            table.add_row("", name, mark, reason)
    console.print(table)


def _optional(console: Console) -> None:
    from rwkv7.machine import package_version

    lines = {name: package_version(name) or f"not here; {use}" for name, use in _EXTRAS.items()}
    _list(console, "Optional packages", lines)


def _compiled(console: Console) -> None:
    from rwkv7.wkv7.registry import CompiledBackend, backend_names, get_backend

    for name in backend_names():
        backend = get_backend(name)
        if isinstance(backend, CompiledBackend):
            _list(console, f"Kernels of the backend {name}", backend.kernels())


def _caches(console: Console) -> None:
    home = Path.home()
    places = {
        "triton": Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache")),
        "torch extensions": Path(
            os.environ.get("TORCH_EXTENSIONS_DIR", home / ".cache" / "torch_extensions")
        ),
    }
    _list(console, "Compiled kernels are kept in", {n: _held(p) for n, p in places.items()})


def _held(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} (nothing yet)"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"
