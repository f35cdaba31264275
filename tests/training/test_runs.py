"""Whole runs: resumed ones equal uninterrupted ones, and what goes wrong loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rwkv7.training import (
    TrainingDivergedError,
    TrainSettings,
    checkpoint,
    resume_training,
    step,
    train_model,
)
from rwkv7.training.batch import Batch
from rwkv7.training.sources import Windows
from rwkv7.training.watch.log import StepRecord, read_log
from rwkv7.training.watch.report import Report

CPU = "cpu"


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


def at_step(number: int, action: Callable[[], object]) -> Callable[[StepRecord], bool | None]:
    return lambda record: action() is True if record.step == number else None


def kill() -> None:
    raise Killed


def files(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    folder = max((run / "checkpoints").iterdir())
    return {p.name: load_file(p) for p in folder.glob("*.safetensors")}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(run / "log.jsonl") if "loss" in line]


def assert_same_run(one: Path, other: Path) -> None:
    first, second = files(one), files(other)
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[name][key]), f"{name}: {key}"
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path, settings: TrainSettings) -> Path:
    """A run that nothing interrupted; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    result = train_model(settings, [text], run, device=CPU)
    assert result.finished and result.step == 8
    return run


def test_what_a_run_leaves(whole: Path, settings: TrainSettings) -> None:
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoints",
        "data",
        "log.jsonl",
        "loss.png",
    ]
    lines = read_log(whole / "log.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 9), 8]
    assert lines[-1]["held_out_bytes"] == 200
    first = lines[0]
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2))
    assert lines[7]["loss"] < first["loss"] - 0.01
    # Not a parameter is where it began, but for those that no token reaches.
    untouched = [k for k, v in files(whole)["optimizer.safetensors"].items() if not v.any()]
    assert untouched == []


@pytest.mark.parametrize("how", ["asked", "Ctrl-C", "SIGTERM", "killed"])
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path: Path, text: Path, settings: TrainSettings, whole: Path, how: str
) -> None:
    run = tmp_path / "run"
    settings = dataclasses.replace(settings, save_every=3)
    if how == "killed":
        with pytest.raises(Killed):
            train_model(settings, [text], run, device=CPU, on_step=at_step(5, kill))
        assert newest(run) == 3
    else:
        stop = {
            "asked": lambda: True,
            "Ctrl-C": lambda: signal.raise_signal(signal.SIGINT),
            "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
        }[how]
        result = train_model(settings, [text], run, device=CPU, on_step=at_step(5, stop))
        assert (result.finished, result.step, result.evaluation) == (False, 5, None)
        assert newest(run) == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = resume_training(run, {"save_every": 100}, device=CPU)
    assert result.finished and result.evaluation is not None
    assert_same_run(run, whole)


def test_stopped_twice_and_in_another_thread(
    tmp_path: Path, text: Path, settings: TrainSettings, whole: Path
) -> None:
    run = tmp_path / "run"

    def train() -> None:
        train_model(settings, [text], run, device=CPU, on_step=lambda _: True)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    resume_training(run, device=CPU, texts=[text], on_step=at_step(2, lambda: True))
    assert newest(run) == 2
    resume_training(run, settings.to_dict(), device=CPU)
    assert_same_run(run, whole)
    # A finished run has nothing left to do but to say how good it is.
    again = resume_training(run, device=CPU)
    assert again.finished and again.evaluation is not None
    assert_same_run(run, whole)


def test_a_run_that_would_be_another_is_refused(
    tmp_path: Path, text: Path, whole: Path, settings: TrainSettings
) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes() + b".")
    with pytest.raises(ValueError, match=r"another lr \(begun with 0\.003, asked for 0\.5\)"):
        resume_training(whole, {"lr": 0.5, "batch": 2}, device=CPU)
    with pytest.raises(ValueError, match="unknown names learning_rate"):
        resume_training(whole, {"learning_rate": 0.5}, device=CPU)
    with pytest.raises(ValueError, match="not the text that the run was begun with"):
        resume_training(whole, texts=[other], device=CPU)
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        resume_training(tmp_path / "nowhere", device=CPU)
    with pytest.raises(ValueError, match="no whole checkpoint to go on from"):
        resume_training(tmp_path, device=CPU)
    with pytest.raises(ValueError, match=r"a run of 8 steps\. Go on with it \(--resume\)"):
        train_model(settings, [text], whole, device=CPU)
    with pytest.raises(ValueError, match="cannot use 'abacus'"):
        resume_training(whole, device="abacus")


def test_unusable_input_leaves_nothing_behind(
    tmp_path: Path, text: Path, settings: TrainSettings
) -> None:
    empty, run = tmp_path / "empty.txt", tmp_path / "a" / "run"
    empty.touch()
    photos, theirs = tmp_path / "photos", tmp_path / "theirs"
    (theirs / "data").mkdir(parents=True)
    (theirs / "data" / "table.csv").touch()
    photos.mkdir()
    (photos / "me.jpg").touch()
    for change, texts, out, message in (
        ({}, [empty], run, "0 bytes"),
        ({}, [tmp_path / "none.txt"], run, "no file or folder"),
        ({"tokenizer": "words"}, [text], run, "tokenizer: expected one of"),
        ({"held_out": 10**6}, [text], run, "held_out: expected fewer bytes"),
        ({"window": 10**6}, [text], run, "at least 1000001 tokens"),
        ({}, [text], photos, "expected an empty or new folder for the run, found me.jpg"),
        ({}, [text], theirs, "expected an empty or new folder .*, found data/table.csv"),
        ({}, [text], text, "expected a folder, found the file"),
    ):
        with pytest.raises(ValueError, match=message):
            train_model(dataclasses.replace(settings, **change), texts, out, device=CPU)
        assert not run.exists()
    assert [p.name for p in photos.iterdir()] == ["me.jpg"]
    assert (theirs / "data" / "table.csv").exists()
    # What a start that was killed left is no obstacle.
    (run / "data").mkdir(parents=True)
    (run / "data" / "train.bin").write_bytes(b"half")
    assert train_model(settings, [text], run, device=CPU).finished


def test_a_second_process_is_refused(tmp_path: Path, text: Path, settings: TrainSettings) -> None:
    run, refused = tmp_path / "run", []

    def second() -> None:
        for begin in (
            lambda: resume_training(run, device=CPU),
            lambda: train_model(settings, [text], run, device=CPU),
        ):
            with pytest.raises(ValueError, match="is training in this folder"):
                begin()
        refused.append(True)

    train_model(settings, [text], run, device=CPU, on_step=at_step(1, second))
    assert refused == [True]
    assert newest(run) == 8


def test_nan_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, text: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = step.batch_gradients, []

    def poisoned(*given: object, **options: object) -> torch.Tensor:
        calls.append(given)
        return real(*given, **options) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(step, "batch_gradients", poisoned)
    settings = dataclasses.replace(settings, save_every=2)
    with pytest.raises(TrainingDivergedError, match=r"at step 6: the loss is nan.* of step 4"):
        train_model(settings, [text], tmp_path / "run", device=CPU)
    assert newest(tmp_path / "run") == 4
    for tensor in files(tmp_path / "run")["model.safetensors"].values():
        assert tensor.isfinite().all()
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_full_disk_ends_the_run_and_it_goes_on_later(
    tmp_path: Path,
    text: Path,
    settings: TrainSettings,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, real = tmp_path / "run", checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step-00000004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left on device"):
            train_model(dataclasses.replace(settings, save_every=2), [text], run, device=CPU)
    assert newest(run) == 2
    resume_training(run, device=CPU)
    assert_same_run(run, whole)


def test_held_out_text_is_never_trained_on(
    tmp_path: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"a" * 300 + b"Z" * 200)
    seen = set()
    real = Windows.batch

    def spy(self: Windows, step: int) -> Batch:
        batch = real(self, step)
        seen.update(np.unique(torch.cat((batch.inputs, batch.targets)).numpy()).tolist())
        return batch

    monkeypatch.setattr(Windows, "batch", spy)
    train_model(dataclasses.replace(settings, steps=30), [path], tmp_path / "run", device=CPU)
    assert seen == {ord("a")}


def test_text_reads_better_with_the_state_carried(
    tmp_path: Path, text: Path, settings: TrainSettings
) -> None:
    settings = dataclasses.replace(settings, steps=100, batch=8, lr=1e-2, held_out=1000)
    result = train_model(settings, [text], tmp_path / "run", device=CPU)
    assert result.evaluation is not None
    assert result.evaluation.carried < result.evaluation.dropped - 0.05
    assert result.evaluation.carried < 3.5


def test_text_that_is_not_utf8_and_mixed_precision(tmp_path: Path, settings: TrainSettings) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Füße auf der Straße. ".encode("latin-1") * 50)
    settings = dataclasses.replace(settings, dtype="bf16")
    result = train_model(settings, [path], tmp_path / "run", device=CPU)
    assert result.finished and result.evaluation is not None
    assert files(tmp_path / "run")["model.safetensors"]["head.weight"].dtype == torch.float32


def test_resuming_elsewhere_says_what_differs(
    tmp_path: Path, text: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Notes(Report):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    run, notes = tmp_path / "run", Notes()
    train_model(settings, [text], run, device=CPU, on_step=lambda _: True)
    resume_training(run, device=CPU, report=notes, on_step=lambda _: True)
    assert notes.notes == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    resume_training(run, device=CPU, report=notes, on_step=lambda _: True)
    assert "not bit for bit" in notes.notes[0] and "99 now" in notes.notes[0]
    monkeypatch.undo()
    (run / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"damaged")
    resume_training(run, device=CPU, report=notes, on_step=lambda _: True)
    assert "goes on from step 2: step-00000003 cannot be used: model" in notes.notes[-1]
    assert newest(run) == 3


def newest(run: Path) -> int:
    found = checkpoint.newest_checkpoint(run)
    assert found is not None
    return found.step
