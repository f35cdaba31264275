"""Whole runs of several processes: the trajectory, the folder and the end of one process's."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import error, random_model
from safetensors.torch import load_file
from training.parallel.ranks import Ranks

from rwkv7 import ModelConfig, save_model
from rwkv7.nn.model import Block
from rwkv7.training import TrainSettings, resume_training, train_model, tune_model
from rwkv7.training.lock import run_lock
from rwkv7.training.together.processes import Crew
from rwkv7.training.together.team import check_team
from rwkv7.training.watch.log import StepRecord, read_log
from rwkv7.training.watch.report import Report

CPU = "cpu"
# Sums in another order differ in fp32's last digits, which Adam makes larger where a gradient is
# all but zero.
LOSS, WEIGHTS = 1e-5, 1e-4


class Heard(Report):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.steps = self.evaluations = self.samples = 0

    def step(self, record: StepRecord) -> None:
        self.steps += 1

    def evaluation(self, step: int, result: object) -> None:
        self.evaluations += 1

    def sample(self, step: int, text: str) -> None:
        self.samples += 1


def begin(
    settings: dict[str, Any],
    text: Path,
    out: Path,
    base: Path | None = None,
    on_step: Callable[[StepRecord], bool | None] | None = None,
) -> tuple[int, bool, int]:
    """A new run in this process and those beside it: steps, whether finished, steps heard of."""
    heard = Heard()
    given: dict[str, Any] = {"device": CPU, "report": heard, "on_step": on_step}
    if base is not None:
        result = tune_model(base, settings, [text], out, **given)
    else:
        result = train_model(TrainSettings(**settings), [text], out, **given)
    return result.step, result.finished, heard.steps


def go_on(changes: dict[str, Any], out: Path) -> tuple[int, bool]:
    result = resume_training(out, changes, device=CPU)
    return result.step, result.finished


def small(settings: TrainSettings, **changes: Any) -> dict[str, Any]:
    return {**settings.to_dict(), "batch": 5, "steps": 6, **changes}


def losses(run: Path) -> torch.Tensor:
    lines = [line for line in read_log(run / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines])


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = max((run / "checkpoints").iterdir())
    files = sorted(p for p in folder.rglob("*.safetensors") if p.name != "optimizer.safetensors")
    return {f"{p.name}: {k}": x for p in files for k, x in load_file(p).items()}


def assert_same_run(one: Path, other: Path) -> None:
    assert error(losses(one), losses(other)) < LOSS
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    flat = [torch.cat([x.flatten().double() for x in w.values()]) for w in (first, second)]
    assert error(*flat) < WEIGHTS


CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {"accumulate": 2, "sample_every": 3}),
    (3, {"parallel": "fsdp", "eval_every": 3, "save_every": 3, "sample_every": 3}),
    (2, {"parallel": "fsdp", "accumulate": 2, "pack": True, "recompute": "layers"}),
    (2, {"pack": True, "accumulate": 3}),
    (2, {"pack": True, "accumulate": 2, "carry": "exact", "sequence": 30}),
    (3, {"carry": "truncated", "sequence": 30}),
]


@pytest.mark.parametrize(("size", "changes"), CASES)
def test_many_processes_train_as_one(
    ranks: Ranks,
    tmp_path: Path,
    text: Path,
    settings: TrainSettings,
    size: int,
    changes: dict[str, Any],
) -> None:
    given = small(settings, **changes)
    alone = begin(given, text, tmp_path / "one")
    results = ranks.run(size, begin, given, text, tmp_path / "many")
    # The first process tells of the steps; all of them end alike.
    assert results == [alone, *[(*alone[:2], 0)] * (size - 1)]
    assert_same_run(tmp_path / "many", tmp_path / "one")
    logs = [read_log(tmp_path / run / "log.jsonl") for run in ("many", "one")]
    for mine, other in zip(*logs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() & {"held_out_bits_per_byte", "held_out_bits_per_byte_state_dropped"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-4)
    files = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("many", "one")]
    assert files[0] == files[1]


@pytest.mark.parametrize("tune", ["state", "lora"])
def test_what_is_tuned_is_the_same(
    ranks: Ranks, tmp_path: Path, text: Path, settings: TrainSettings, tune: str
) -> None:
    if tune == "lora":
        pytest.importorskip("peft")
    config = ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8)
    save_model(random_model(config, torch.float32), base := tmp_path / "base.pth")
    given = {"tune": tune, "window": 12, "batch": 3, "steps": 4, "held_out": 200}
    begin(given, text, tmp_path / "one", base)
    ranks.run(2, begin, given, text, tmp_path / "many", base)
    assert_same_run(tmp_path / "many", tmp_path / "one")
    assert (tmp_path / "many" / ("adapter" if tune == "lora" else "state.pth")).exists()


def stopped(settings: dict[str, Any], text: Path, out: Path, how: str) -> Any:
    """A run that the last process stops at step 3, though not the others."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def on_step(record: StepRecord) -> bool | None:
        if record.step != 3 or not last:
            return None
        if how == "asked":
            return True
        signal.raise_signal(getattr(signal, how))
        return None

    return begin(settings, text, out, on_step=on_step)


@pytest.mark.parametrize(
    ("how", "mode", "first", "second"),
    [
        ("asked", "fsdp", 2, 3),
        ("SIGTERM", "fsdp", 3, 1),
        ("SIGINT", "ddp", 2, 3),
    ],
)
def test_all_stop_at_one_step_and_any_number_goes_on(
    ranks: Ranks,
    tmp_path: Path,
    text: Path,
    settings: TrainSettings,
    how: str,
    mode: str,
    first: int,
    second: int,
) -> None:
    given, out = small(settings, parallel=mode), tmp_path / "many"
    begin(given, text, tmp_path / "one")
    results = ranks.run(first, stopped, given, text, out, how)
    assert [result[:2] for result in results] == [(3, False)] * first
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-00000000", "step-00000003"]
    about = json.loads((out / "checkpoints" / names[-1] / "training.json").read_text())
    assert about["machine"]["processes"] == first
    with run_lock(out):  # which nobody holds any more
        pass
    assert ranks.run(second, go_on, {}, out) == [(6, True)] * second
    assert_same_run(out, tmp_path / "one")


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


def killed(settings: dict[str, Any], text: Path, out: Path) -> None:
    def on_step(record: StepRecord) -> None:
        if record.step == 5:
            raise Killed

    with pytest.raises(Killed):
        begin(settings, text, out, on_step=on_step)


def test_parts_that_a_kill_left_are_joined(
    ranks: Ranks, tmp_path: Path, text: Path, settings: TrainSettings
) -> None:
    given, out = small(settings, parallel="fsdp", save_every=2), tmp_path / "many"
    ranks.run(2, killed, given, text, out)
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["sharded-00000002", "sharded-00000004", "step-00000000"]
    heard = Heard()
    assert resume_training(out, {}, device=CPU, report=heard).finished
    assert heard.steps == 2
    begin(given, text, tmp_path / "one")
    assert_same_run(out, tmp_path / "one")


def poisoned(settings: dict[str, Any], text: Path, out: Path) -> str:
    """A run in which the third step of the last process meets a NaN; the message."""
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    forward, wrong = Block.forward, False

    def broken(self: Block, *given: Any, **options: Any) -> Any:
        x, *rest = forward(self, *given, **options)
        return (x * float("nan") if wrong else x), *rest

    def on_step(record: StepRecord) -> None:
        nonlocal wrong
        wrong = last and record.step == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", broken)
        with pytest.raises(Exception) as raised:
            begin(settings, text, out, on_step=on_step)
    return f"{type(raised.value).__name__}: {raised.value}"


@pytest.mark.parametrize(
    "changes",
    [{}, {"parallel": "fsdp"}, {"carry": "exact", "sequence": 30}],
)
def test_a_nan_in_one_process_stops_all_in_one_line(
    ranks: Ranks, tmp_path: Path, text: Path, settings: TrainSettings, changes: dict[str, Any]
) -> None:
    given = small(settings, save_every=2, **changes)
    first, other = ranks.run(2, poisoned, given, text, tmp_path / "run")
    assert first.startswith("TrainingDivergedError: stopped at step 3: the loss is nan")
    assert "the output of blocks.0 (forward pass), in process 1 of 2" in first
    assert "The last good checkpoint, of step 2, is kept" in first and "\n" not in first
    assert other.split(": ", 1)[0] == "OtherProcessError"
    assert resume_training(tmp_path / "run", {}, device=CPU).finished


def refused(settings: dict[str, Any], text: Path, out: Path) -> str:
    with pytest.raises(Exception) as raised:
        begin(settings, text, out)
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_mistake_stops_all_and_one_tells(
    ranks: Ranks, tmp_path: Path, text: Path, settings: TrainSettings
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    for changes, out, message in (
        ({"batch": 1}, "run", "at least one for each of 2 processes, found 1"),
        ({"window": 10**6}, "run", "at least 1000001 tokens"),
        ({}, "photos", "expected an empty or new folder for the run, found me.jpg"),
    ):
        first, other = ranks.run(2, refused, small(settings, **changes), text, tmp_path / out)
        assert first.startswith("ValueError: ") and message in first
        assert other.startswith("OtherProcessError: process 0 of 2: ") and message in other
        assert not (tmp_path / "run").exists()


def fails_in_the_second() -> str:
    crew = Crew()

    def work() -> int:
        if crew.rank == 1:
            raise OSError("no such disk")
        return crew.rank

    try:
        return str(crew.together(work))
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


def test_a_problem_of_one_process_is_everyones(ranks: Ranks) -> None:
    others = "OtherProcessError: process 1 of 3: no such disk"
    assert ranks.run(3, fails_in_the_second) == [others, "OSError: no such disk", others]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 3}, "for each of 4 processes, found 3"),
        ({"parallel": "fsdp", "tune": "state"}, "parallel: expected \"ddp\" with tune 'state'"),
        ({"parallel": "fsdp", "carry": "exact", "sequence": 9}, 'expected "ddp" with carry'),
        ({"pack": True, "carry": "truncated", "sequence": 9}, "depends on where windows are cut"),
    ],
)
def test_what_processes_cannot_do_together(changes: dict[str, Any], message: str) -> None:
    settings = dataclasses.replace(TrainSettings(), **changes)
    check_team(settings, 1)
    with pytest.raises(ValueError, match=message):
        check_team(settings, 4)
