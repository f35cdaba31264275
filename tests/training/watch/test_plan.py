"""A plan's memory is that of the run, whatever makes it smaller, and a huge run is not tried."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv7.benchmark.clock import peak_mib
from rwkv7.training import TrainResult, TrainSettings, plan_training, train_model
from rwkv7.training.runs import _new_model, find_text
from rwkv7.training.step import step_gradients
from rwkv7.training.watch import plan as planned
from rwkv7.training.watch.log import read_log

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


@pytest.mark.parametrize("how", LESS)
def test_a_run_is_refused_for_a_step_that_has_no_room_and_for_no_other(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    settings = TrainSettings(**{**SIZES, **LESS[how], "batch": 64, "steps": 1})
    run, need = tmp_path / "run", really(settings, text)

    def begin(free: float) -> TrainResult:
        monkeypatch.setattr(planned, "free_memory", lambda device: round(free))
        return train_model(settings, [text], run, device=CPU, on_step=lambda _: True)

    with pytest.raises(ValueError, match="batch: a step of 64 takes about .* are free: use a smal"):
        begin(need / 2)
    assert not run.exists()
    assert begin(1.2 * need).step == 1


def test_what_surely_fits_is_not_tried(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "_beyond", lambda *_: pytest.fail("tried"))
    settings = TrainSettings(**SIZES, steps=1)
    train_model(settings, [text], tmp_path / "run", device=CPU, on_step=lambda _: True)


def test_asking_for_room_changes_no_weight(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, norms = TrainSettings(**SIZES, steps=2), []
    for most in (planned.MOST_KEPT, 10**12):
        monkeypatch.setattr(planned, "MOST_KEPT", most)
        train_model(settings, [text], tmp_path / str(most), device=CPU)
        norms.append([x["grad_norm"] for x in read_log(tmp_path / str(most) / "log.jsonl")[:2]])
    assert norms[0] == norms[1]


def test_a_model_without_room_is_refused_before_it_is_made(tmp_path: Path, text: Path) -> None:
    settings = TrainSettings(**{**SIZES, "width": 16 * 40_000})
    with pytest.raises(ValueError, match="memory: training .* parameters takes at least"):
        train_model(settings, [text], tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
