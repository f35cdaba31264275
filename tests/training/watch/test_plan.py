"""A plan's memory is that of the run, whatever makes it smaller, and a huge run is not tried."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv7.benchmark.clock import peak_mib
from rwkv7.training import TrainSettings, plan_training
from rwkv7.training.runs import _new_model, find_text
from rwkv7.training.step import step_gradients
from rwkv7.training.watch import plan as planned

CPU = torch.device("cpu")
SIZES = {"layers": 2, "width": 32, "head_size": 16, "window": 64, "batch": 4, "dtype": "fp32"}
LESS = {
    "nothing": {},
    "parts": {"accumulate": 4},
    "layers again": {"recompute": "layers"},
    "cheap again": {"recompute": "cheap"},
    "windows": {"window": 16, "sequence": 64, "carry": "exact"},
}


def really(settings: TrainSettings, text: Path) -> float:
    """The bytes of a step of the run beyond weights and moments, at their most."""
    tuning = _new_model(settings, CPU, find_text([text])).make()
    tuning.model.recompute = settings.recompute
    batch = planned._batch(tuning, settings.batch, settings.sequence or settings.window, CPU)
    step_gradients(tuning, batch, settings)
    tuning.model.zero_grad(set_to_none=True)
    peak = peak_mib(lambda: step_gradients(tuning, batch, settings), CPU)
    assert peak is not None
    return peak * 2**20


@pytest.mark.parametrize("how", LESS)
def test_the_memory_is_that_of_a_step(text: Path, how: str) -> None:
    given: dict[str, Any] = {**SIZES, **LESS[how]}
    plan = plan_training(given, [text], device=CPU)
    assert plan.activations is not None
    expected = really(TrainSettings(**given), text)
    assert plan.activations + 4 * plan.trained == pytest.approx(expected, rel=0.05)
    if how != "nothing":
        most = 0.95 if how == "cheap again" else 0.7
        whole = plan_training(SIZES, [text], device=CPU)
        assert whole.activations is not None and plan.activations < most * whole.activations


def test_a_step_that_does_not_fit_or_takes_long_is_told_without_being_tried(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    real = planned._steps

    def steps(tuning: Any, settings: Any, batch: Any, optimizer: Any) -> Any:
        tried.append(batch.inputs.numel())
        return real(tuning, settings, batch, optimizer)

    monkeypatch.setattr(planned, "_steps", steps)
    sizes = {**SIZES, "window": 256, "batch": 8}
    whole = plan_training(sizes, [text], device=CPU)
    assert tried == [planned.PROBE, 8 * 256]
    monkeypatch.setattr(planned, "PATIENCE", 0.0)
    slow = plan_training(sizes, [text], device=CPU)
    assert tried == [planned.PROBE, 8 * 256, planned.PROBE]
    assert whole.activations is not None and slow.activations is not None
    assert slow.activations == pytest.approx(whole.activations, rel=0.3)
    assert slow.seconds_per_step is not None
    huge = plan_training({**SIZES, "batch": 100_000_000}, [text], device=CPU)
    assert len(tried) == 4 and huge.seconds_per_step is None
    assert huge.activations is not None and huge.activations > 10**12
    assert "does not fit into the memory that is free" in huge.lines()[-1]


def test_what_is_not_known_is_said_in_words() -> None:
    assert planned.free_memory(torch.device("meta")) is None
    plan = planned.Plan(
        parameters=1,
        trained=1,
        weights=4,
        activations=None,
        steps=1,
        tokens_per_step=7,
        text_tokens=None,
        seconds_per_step=None,
    )
    assert plan.lines()[-1].endswith("the memory that is free")
    packed = dataclasses.replace(plan, packed=True)
    assert packed.lines()[2] == "tokens       at most 7 in 1 steps of 7"
