"""What a run would take, told before it begins: parameters, memory, tokens and time.

Nothing is written. Memory and time come from steps on random tokens, made with the run's own model
on its own device: of the run's own size, or, where these do not fit or take long, by a small one's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rwkv7.benchmark.clock import peak_mib
from rwkv7.training.batch import Batch
from rwkv7.training.data import BadRecords
from rwkv7.training.optim import make_optimizer
from rwkv7.training.settings import TrainSettings
from rwkv7.training.step import step_gradients
from rwkv7.training.tuning import Tuning

__all__ = ["Plan", "check_model_fits", "check_step_fits", "free_memory", "make_plan"]

TIMED = 2  # steps, after the first, which is slower
PROBE = 128  # tokens of the first, small steps
PATIENCE = 30.0  # seconds; a step that would take longer is not tried
MOST_KEPT = 400  # bytes of a step for each token, channel and layer; it takes fewer
SURELY = 1.25  # a run is refused for a step that by `_scaled` takes so many times what is free


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run in figures; sizes in bytes. None: not known.

    Gradients are as large as what is trained, moments twice that, in fp32. A `packed` step holds at
    most so many tokens. `free` is the memory that can be had.
    """

    parameters: int
    trained: int
    weights: int
    activations: int | None
    steps: int
    tokens_per_step: int
    text_tokens: int | None
    seconds_per_step: float | None
    packed: bool = False
    free: int | None = None
    bad_records: int = 0

    def lines(self) -> list[str]:
        """The figures in words, a line each."""
        most = "at most " * self.packed
        return [
            f"parameters   {self.parameters:,}, of which {self.trained:,} are trained",
            f"memory       {self._memory()}",
            f"tokens       {most}{self.steps * self.tokens_per_step:,} in {self.steps:,} steps of "
            f"{self.tokens_per_step:,}",
            f"text         {self._text()}",
            f"time         {self._time()}",
            *([BadRecords.in_words(self.bad_records)] if self.bad_records else []),
        ]

    def _memory(self) -> str:
        gradients = 4 * self.trained
        parts = {"weights": self.weights, "gradients": gradients, "moments": 2 * gradients}
        known = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
        if self.activations is None:
            return f"at least {_bytes(sum(parts.values()))} ({known}, activations not known)"
        whole = _bytes(sum(parts.values()) + self.activations)
        return f"about {whole} ({known}, activations {_bytes(self.activations)})"

    def _text(self) -> str:
        if not self.text_tokens:
            return "not known before it is read"
        times = self.steps * self.tokens_per_step / self.text_tokens
        return f"about {self.text_tokens:,} tokens to train on, read {times:.2f} times"

    def _time(self) -> str:
        seconds = self.seconds_per_step
        if seconds is None:
            free = "" if self.free is None else f" ({_bytes(self.free)})"
            return f"not known: this does not fit into the memory that is free{free}"
        speed = self.tokens_per_step / seconds
        return f"about {_clock(seconds * self.steps)} ({speed:,.0f} tokens/s), evaluation apart"


def make_plan(
    settings: TrainSettings,
    config_parameters: int,
    make: Callable[[], Tuning],
    device: torch.device,
    text_tokens: int | None,
) -> Plan:
    """The plan of a run.

    Args:
        settings: of the run, with its dtype decided.
        config_parameters: how many the model has, for one that cannot even be made here.
        make: gives the model and what is trained of it, as the run would.
        device: where it is made.
        text_tokens: to train on, or None.
    """
    least = _least(settings, config_parameters)
    free = free_memory(device)
    plan = Plan(
        parameters=config_parameters,
        trained=config_parameters if settings.tune == "full" else 0,
        weights=4 * config_parameters,
        activations=None,
        seconds_per_step=None,
        steps=settings.steps,
        tokens_per_step=settings.batch * _row(settings),
        text_tokens=text_tokens,
        packed=settings.chat,
        free=free,
    )
    if free is not None and free < least:
        return plan
    tuning = make()
    tuning.model.recompute = settings.recompute
    every = {id(x): x for m in (tuning.model, tuning.trained) for x in m.parameters()}
    trained = [x for x in tuning.trained.parameters() if x.requires_grad]
    plan = replace(
        plan,
        parameters=sum(x.numel() for x in every.values()),
        trained=sum(x.numel() for x in trained),
        weights=sum(x.nbytes for x in every.values()),
    )
    try:
        activations, seconds = _measured(tuning, settings, device)
    except torch.OutOfMemoryError:
        return plan
    return replace(plan, activations=activations, seconds_per_step=seconds)


def check_model_fits(settings: TrainSettings, parameters: int, device: torch.device) -> None:
    """Raises ValueError for a model of so many parameters that has no room on the device."""
    free, least = free_memory(device), _least(settings, parameters)
    if free is not None and least > free:
        raise ValueError(
            f"memory: training {parameters:,} parameters takes at least {_bytes(least)}, and "
            f"{_bytes(free)} of {device} are free"
        )


def check_step_fits(
    tuning: Tuning, settings: TrainSettings, device: torch.device, tokens: int, processes: int = 1
) -> None:
    """Raises ValueError for a run whose steps surely have no room. Gradients are left empty.

    Args:
        tuning: before the first step.
        settings: of the run.
        device: that of the steps; one that has no model yet is not asked.
        tokens: of a whole step at most.
        processes: that share out the step's batch.
    """
    config, free = tuning.model.config, free_memory(device)
    rows = -(-settings.batch // processes)
    parts = min(settings.accumulate, max(1, settings.batch // processes))
    at_once = min(_at_once(replace(settings, batch=rows, accumulate=parts)), tokens)
    least_to_ask = at_once * config.layers * config.width * MOST_KEPT
    if free is None or least_to_ask < free or tuning.model.device.type != device.type:
        return
    probe = replace(settings, batch=1, accumulate=1)
    tuning.model.recompute = settings.recompute
    small = _beyond(tuning, probe, _batch(tuning, 1, min(_row(settings), PROBE), device))
    tuning.trained.zero_grad(set_to_none=True)
    if small is None:
        return
    size = sum(x.nbytes for x in tuning.trained.parameters() if x.requires_grad)
    need = _scaled(small, at_once, min(_at_once(probe), PROBE)) + 3 * size
    if need > SURELY * free:
        raise ValueError(
            f"batch: a step of {settings.batch:,} takes about {_bytes(need)} beside the weights, "
            f"and {_bytes(free)} of {device} are free: use a smaller one, work through it in "
            "parts (--accumulate), or keep less of it (--recompute layers)"
        )


def _least(settings: TrainSettings, parameters: int) -> int:
    return 4 * parameters * (4 if settings.tune == "full" else 1)


def _row(settings: TrainSettings) -> int:
    return settings.sequence or settings.window


def _at_once(settings: TrainSettings) -> int:
    """The tokens whose graph is in memory together."""
    row = _row(settings)
    return -(-settings.batch // settings.accumulate) * (
        row if settings.carry == "off" else min(row, settings.window)
    )


def _scaled(small: int, at_once: int, tried: int) -> int:
    """The bytes of a step from those of a `small` one that `tried` so many tokens at once."""
    return small * max(at_once, tried) // tried


def _measured(
    tuning: Tuning, settings: TrainSettings, device: torch.device
) -> tuple[int | None, float | None]:
    """The bytes of a step beyond weights, gradients and moments, and its seconds.

    A few tokens tell first whether whole steps fit, and are not too slow to be tried.
    """
    optimizer = make_optimizer(tuning.trained, settings)
    row, tokens = _row(settings), settings.batch * _row(settings)
    tried = min(row, PROBE)
    probe = replace(settings, batch=1, accumulate=1)
    small, quick = _steps(tuning, probe, _batch(tuning, 1, tried, device), optimizer)
    told = (
        None if small is None else _scaled(small, _at_once(settings), min(_at_once(probe), PROBE))
    )
    seconds = quick * tokens / tried
    free = free_memory(device)
    if told is not None and free is not None and told > free:
        return told, None
    if seconds > PATIENCE:
        return told, seconds
    return _steps(tuning, settings, _batch(tuning, settings.batch, row, device), optimizer)


def _batch(tuning: Tuning, rows: int, tokens: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, tokens + 1)
    ids = torch.randint(tuning.model.config.vocab_size, shape, generator=generator)
    return Batch(inputs=ids[:, :-1], targets=ids[:, 1:]).to(device)


def _steps(
    tuning: Tuning, settings: TrainSettings, batch: Batch, optimizer: torch.optim.Optimizer
) -> tuple[int | None, float]:
    """Bytes beyond weights, gradients and moments at the peak of a step, and its seconds."""
    device = batch.inputs.device

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        step_gradients(tuning, batch, settings)
        optimizer.step()

    step()  # the first is slower, and makes the moments
    started = time.perf_counter()
    for _ in range(TIMED):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / TIMED
    optimizer.zero_grad(set_to_none=True)
    return _beyond(tuning, settings, batch), seconds


def _beyond(tuning: Tuning, settings: TrainSettings, batch: Batch) -> int | None:
    """Bytes beyond weights, gradients and moments at the peak of a step; gradients are left."""
    peak = peak_mib(lambda: step_gradients(tuning, batch, settings), batch.inputs.device)
    size = sum(x.nbytes for x in tuning.trained.parameters() if x.requires_grad)
    return None if peak is None else max(0, round(peak * 2**20) - size)


def free_memory(device: torch.device) -> int | None:
    """The bytes that can be had on the device, in a container no more than it may use, or None."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError, ValueError):  # Linux: pages of files can be had, too
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")]
    if not found and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    return min(found, default=None)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
