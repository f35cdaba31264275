"""What a run would take, told before it begins: parameters, memory, tokens and time.

Nothing is written. Memory and time come from steps on random tokens, made with the run's own model
on its own device; where the model alone does not fit there, they stay unknown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkv7.training.batch import Batch
from rwkv7.training.data import BadRecords
from rwkv7.training.optim import make_optimizer
from rwkv7.training.settings import TrainSettings
from rwkv7.training.step import step_gradients
from rwkv7.training.tuning import Tuning

__all__ = ["Plan", "make_plan"]

TIMED = 2  # steps, after the first, which is slower


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run in figures; sizes in bytes. None: not known."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    moments: int
    activations: int | None
    steps: int
    tokens_per_step: int
    text_tokens: int | None
    seconds_per_step: float | None
    bad_records: int = 0

    def lines(self) -> list[str]:
        """The figures in words, a line each."""
        total = self.steps * self.tokens_per_step
        parts = {"weights": self.weights, "gradients": self.gradients, "moments": self.moments}
        known = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
        if self.activations is None:
            memory = f"at least {_bytes(sum(parts.values()))} ({known}, activations not known)"
        else:
            whole = _bytes(sum(parts.values()) + self.activations)
            memory = f"about {whole} ({known}, activations {_bytes(self.activations)})"
        text = "not known before it is read"
        if self.text_tokens:
            text = f"about {self.text_tokens:,}, read {total / self.text_tokens:.2f} times"
        seconds = self.seconds_per_step
        spent = "not known: the model does not fit into the memory that is free"
        if seconds is not None:
            speed = self.tokens_per_step / seconds
            spent = (
                f"about {_clock(seconds * self.steps)} ({speed:,.0f} tokens/s), evaluation apart"
            )
        return [
            f"parameters   {self.parameters:,}, of which {self.trained:,} are trained",
            f"memory       {memory}",
            f"tokens       {total:,} in {self.steps:,} steps of {self.tokens_per_step:,}",
            f"text         {text}",
            f"time         {spent}",
            *([BadRecords.in_words(self.bad_records)] if self.bad_records else []),
        ]


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
    tokens = settings.batch * (settings.sequence or settings.window)
    least = 4 * config_parameters * (4 if settings.tune == "full" else 1)
    free = _free_memory(device)
    if free is not None and free < least:
        trained = config_parameters if settings.tune == "full" else 0
        return Plan(
            parameters=config_parameters,
            trained=trained,
            weights=4 * config_parameters,
            gradients=4 * trained,
            moments=8 * trained,
            activations=None,
            seconds_per_step=None,
            steps=settings.steps,
            tokens_per_step=tokens,
            text_tokens=text_tokens,
        )
    tuning = make()
    every = {id(x): x for m in (tuning.model, tuning.trained) for x in m.parameters()}
    trained_tensors = [x for x in tuning.trained.parameters() if x.requires_grad]
    size = sum(x.nbytes for x in trained_tensors)
    try:
        activations, seconds = _measured(tuning, settings, device)
    except torch.OutOfMemoryError:
        activations, seconds = None, None
    return Plan(
        parameters=sum(x.numel() for x in every.values()),
        trained=sum(x.numel() for x in trained_tensors),
        weights=sum(x.nbytes for x in every.values()),
        gradients=size,
        moments=2 * size,
        activations=activations,
        seconds_per_step=seconds,
        steps=settings.steps,
        tokens_per_step=tokens,
        text_tokens=text_tokens,
    )


def _measured(tuning: Tuning, settings: TrainSettings, device: torch.device) -> tuple[int, float]:
    """Bytes kept for the backward pass of a step, and the seconds of a later one."""
    optimizer = make_optimizer(tuning.trained, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch, (settings.sequence or settings.window) + 1)
    vocab_size = tuning.model.config.vocab_size
    ids = torch.randint(vocab_size, shape, generator=generator)
    batch = Batch(inputs=ids[:, :-1], targets=ids[:, 1:]).to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        step_gradients(tuning, batch, settings)
        optimizer.step()

    with _kept_bytes(tuning.model) as kept:
        step()
    started = time.perf_counter()
    for _ in range(TIMED):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return kept(), (time.perf_counter() - started) / TIMED


@contextmanager
def _kept_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Inside, the memory of all that autograd keeps is counted, once each, without parameters."""
    own = {x.untyped_storage().data_ptr() for x in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield lambda: sum(kept.values())


def _free_memory(device: torch.device) -> int | None:
    """The bytes that can be had on the device, or None."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
